"""Audio, music, audio codes and images as streams of tokens, each kind by a name as tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from wavelet_lm.data.modalities.audio import LinearAudio, MuLawAudio
from wavelet_lm.data.modalities.encodec import EncodecCodes
from wavelet_lm.data.modalities.images import Pixels
from wavelet_lm.data.modalities.midi import Midi
from wavelet_lm.data.modalities.modality import Modality

__all__ = ["MODALITY_NAMES", "Modality", "find_modality", "names_for"]

_KINDS: dict[str, Callable[..., Modality]] = {
    kind.name: kind for kind in (MuLawAudio, LinearAudio, Midi, EncodecCodes)
} | dict.fromkeys(("pixels", "pixels_rgb"), Pixels)
MODALITY_NAMES = tuple("encodec[:CODEBOOK]" if n == "encodec" else n for n in _KINDS)


def find_modality(name: str, **details: object) -> Modality | None:
    """The modality of this name, None where there is none; details: as `save` has written them.

    Raises:
        UserError: `encodec:N` with an N that is no number.
    """
    kind = _KINDS.get(name.partition(":")[0])
    if kind is None or (":" in name and kind is not EncodecCodes):
        return None
    return kind(name, **details)


def names_for(files: Iterable[Path]) -> tuple[str, tuple[str, ...]] | None:
    """The first suffix among the files that modalities read, and the names of those."""
    for file in files:
        suffix = file.suffix.lower()
        names = tuple(n for n, kind in _KINDS.items() if suffix in kind.suffixes)
        if names:
            return suffix, names
    return None
