"""EnCodec's codes (Défossez et al., "High Fidelity Neural Audio Compression", 2022) as tokens.

Arrays [codebook, T] of 0 … 1023 from `.npy` or `.pt` files; `encodec` reads the first codebook,
which is the coarsest, `encodec:N` codebook N. Audio to codes and back is the work of the EnCodec
package or of transformers' `EncodecModel`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from wavelet_lm.atomic_files import atomic_path, unreadable
from wavelet_lm.data.modalities.modality import Modality
from wavelet_lm.errors import UserError

CODES = 1024


class EncodecCodes(Modality):
    """One codebook of code arrays. name: `encodec` or `encodec:CODEBOOK`."""

    name, kind, suffixes, output = "encodec", "codes", (".npy", ".pt"), ".npy"
    vocab_size = CODES

    def __init__(self, name: str = "encodec"):
        number = name.removeprefix("encodec").removeprefix(":") or "0"
        if not number.isascii() or not number.isdigit() or name.endswith(":"):
            raise UserError(
                f"tokenizer {name!r}: write encodec:N with the number of a codebook, 0 the coarsest"
            )
        self.codebook = int(number)
        self.name = f"encodec:{self.codebook}" if self.codebook else "encodec"

    def read(self, path: Path) -> Iterator[np.ndarray]:
        codes = self._of_codebook(_load(path), path)
        outside = (codes < 0) | (codes >= CODES)
        if outside.any():
            place = int(np.argmax(outside))
            raise UserError(
                f"{path}: code {codes[place]} at position {place} of codebook {self.codebook} is"
                f" not among 0 … {CODES - 1}"
            )
        yield codes.astype(np.uint16)

    def _of_codebook(self, array: np.ndarray, path: Path) -> np.ndarray:
        while array.ndim > 2 and array.shape[0] == 1:  # a batch of one
            array = array[0]
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
            raise UserError(
                f"{path}: an array {list(array.shape)} of {array.dtype}; it must be [codebook, T]"
                " or [T] of integers"
            )
        if array.ndim == 1:
            array = array[None]
        if self.codebook >= len(array):
            raise UserError(
                f"{path}: there are {len(array)} codebooks (0 … {len(array) - 1}) and"
                f" {self.name} reads codebook {self.codebook}"
            )
        return array[self.codebook]

    def write(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.asarray(tokens, dtype=np.int64)[None])


def _load(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: cannot be read as an array ({reason})") from None
    if not isinstance(loaded, torch.Tensor):
        raise UserError(
            f"{path}: holds a {type(loaded).__name__}; save the tensor [codebook, T] itself"
        )
    return loaded.numpy()
