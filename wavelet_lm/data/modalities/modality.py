"""What all kinds of files that are no text offer: files to tokens, and tokens to a file."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from wavelet_lm.data.tokenizer_base import Tokenizer, Tokens
from wavelet_lm.errors import UserError


class Modality(Tokenizer):
    """A tokenizer of files in place of text: its tokens have no bytes, and follow without a mark.

    kind: the files in one word; suffixes: of the files that it reads, in small letters; output: of
    the file that it writes; start: the token that a piece without a prompt starts from; column: of
    MAESTRO's table (v3.0.0), which names the files and their splits.
    """

    kind: str
    suffixes: tuple[str, ...]
    output: str
    start: int = 0
    column: str | None = None

    def read(self, path: Path) -> Iterator[np.ndarray]:
        """The tokens of one file, in stretches of bounded size where the format allows it.

        Raises:
            UserError: the file is not what its name says.
        """
        raise NotImplementedError

    def write(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        """A file that reads as these tokens; it appears whole or not at all."""
        raise NotImplementedError

    def read_prompt(self, path: Path) -> list[int]:
        """The tokens of a file that is to be continued, 1 or more."""
        tokens = [token for part in self.read(path) for token in part.tolist()]
        if not tokens:
            raise UserError(f"{path}: holds nothing to continue; leave the prompt out")
        return tokens

    def fitted(self, files: Sequence[Path]) -> Modality:
        """The same with what it must know of the files, such as the size of images."""
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it knows that."""
        return True

    def check(self, path: Path) -> Path:
        """The path, if it is one that can be read here.

        Raises:
            UserError: it has another suffix, or there is no such file.
        """
        if path.suffix.lower() not in self.suffixes:
            known = ", ".join(self.suffixes)
            raise UserError(f"{path}: {self.name} reads {self.kind} files ({known})")
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        return path

    # --- as a tokenizer of text, of which there is none ------------------------------------------

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        if any(texts):
            raise UserError(
                f"the tokens of {self.name} are {self.kind}, not text; give the prompt as a file"
                f" ({', '.join(self.suffixes)})"
            )
        return [[] for _ in texts]

    def token_bytes(self, token: int) -> bytes:
        return b""

    def decode(self, ids: Iterable[int]) -> str:
        return ""


def needed(module: str, path: Path, package: str | None = None) -> ModuleType:
    """The library that reads or writes this file.

    Args:
        package: its name for pip, where it is another.

    Raises:
        UserError: it is not there, or not all of it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: soundfile on a system without libsndfile
        package = package or module
        raise UserError(
            f"{path}: needs {package}, so first run `python -m pip install {package}`"
        ) from error
