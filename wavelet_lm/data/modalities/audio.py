"""Raw audio as one token per sample: mono, 16 kHz, 256 levels.

Two ways from a sample x in [−1, 1] to a level 0 … 255 and back:

    mulaw   y = sgn(x) ln(1 + 255 |x|) / ln 256, level = round((y + 1) / 2 · 255): the compression
            of ITU-T G.711 in its continuous form, as van den Oord et al., "WaveNet", 2016, use it
    pcm8    level = round(128 x) + 128: the samples of an 8-bit WAV file

Channels are averaged. Other rates are resampled (soxr), files are read by soundfile: every width
of integers and floats, with the plain and the extensible header. A file is written as 16-bit PCM,
which is fine enough to give the same levels again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from wavelet_lm.atomic_files import atomic_path, unreadable
from wavelet_lm.data.modalities.modality import Modality, needed
from wavelet_lm.errors import UserError

SAMPLE_RATE = 16_000
FRAMES_AT_ONCE = 1 << 18
MU = 255


class Audio(Modality):
    """Samples as levels; a subclass says how loud each level is."""

    kind, suffixes, output, column = "audio", (".wav", ".flac"), ".wav", "audio_filename"
    vocab_size, start = 256, 128

    def __init__(self, name: str | None = None):
        self.name = name or type(self).name

    def levels(self, samples: np.ndarray) -> np.ndarray:
        """Float samples in [−1, 1] to levels, uint8 of the same shape; louder ones are clipped."""
        raise NotImplementedError

    def samples(self, levels: np.ndarray) -> np.ndarray:
        """Levels to float64 samples in [−1, 1]."""
        raise NotImplementedError

    def read(self, path: Path) -> Iterator[np.ndarray]:
        return map(self.levels, samples_of(path))

    def write(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        soundfile = needed("soundfile", path)
        samples = self.samples(np.asarray(tokens, dtype=np.float64))
        pcm = np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
        with atomic_path(path) as temporary:
            soundfile.write(temporary, pcm, SAMPLE_RATE, subtype="PCM_16", format="WAV")


class MuLawAudio(Audio):
    """Levels as ITU-T G.711 spaces them (μ = 255), fine about zero and coarse far from it."""

    name = "mulaw"

    def levels(self, samples: np.ndarray) -> np.ndarray:
        x = np.clip(samples.astype(np.float64), -1, 1)
        y = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
        return np.floor((y + 1) / 2 * MU + 0.5).astype(np.uint8)

    def samples(self, levels: np.ndarray) -> np.ndarray:
        y = 2 * levels / MU - 1
        return np.sign(y) * np.expm1(np.abs(y) * np.log1p(MU)) / MU


class LinearAudio(Audio):
    """Levels at equal steps: 256 of them over [−1, 1)."""

    name = "pcm8"

    def levels(self, samples: np.ndarray) -> np.ndarray:
        levels = np.floor(samples.astype(np.float64) * 128 + 0.5) + 128
        return np.clip(levels, 0, 255).astype(np.uint8)

    def samples(self, levels: np.ndarray) -> np.ndarray:
        return (levels - 128) / 128


def samples_of(path: Path) -> Iterator[np.ndarray]:
    """The samples of an audio file, mono at 16 kHz, float32 [n], in stretches of bounded size.

    Raises:
        UserError: the file is no audio, is cut short, or has samples that are not finite.
    """
    with _opened(path) as file:
        if file.samplerate == SAMPLE_RATE:
            yield from _mono(file, path)
        else:
            yield from _resampled(_mono(file, path), file.samplerate, path)


def n_seconds(path: Path) -> float:
    """How long an audio file lasts, by its header.

    Raises:
        UserError: as `samples_of`, but for samples, which are not read.
    """
    with _opened(path) as file:
        return file.frames / file.samplerate


def samples_between(path: Path, start: float, seconds: float) -> np.ndarray:
    """The samples of a part of an audio file as `samples_of` gives them, fewer at its end."""
    with _opened(path) as file:
        file.seek(min(file.frames, round(start * file.samplerate)))
        frames = file.read(round(seconds * file.samplerate), dtype="float32", always_2d=True)
        samples = _checked(frames, file.tell() - len(frames), path)
        if file.samplerate != SAMPLE_RATE:
            samples = np.concatenate([*_resampled(iter([samples]), file.samplerate, path)])
    return samples[: round(seconds * SAMPLE_RATE)]


@contextmanager
def _opened(path: Path) -> Iterator:
    """The open file; what libsndfile says against it is a `UserError`."""
    soundfile = needed("soundfile", path)
    if path.suffix.lower() == ".wav":
        _refuse_cut_short(path)
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise UserError(f"{path}: cannot be read as audio ({reason.rstrip('.')})") from None


def _mono(file, path: Path) -> Iterator[np.ndarray]:
    position = 0
    for frames in file.blocks(FRAMES_AT_ONCE, dtype="float32", always_2d=True):
        yield _checked(frames, position, path)
        position += len(frames)
    if position < file.frames:  # of a format with frames of its own, such as FLAC
        raise UserError(
            f"{path}: cut short: {file.frames:,} samples are promised and {position:,} are there;"
            " get the file again"
        )


def _checked(frames: np.ndarray, position: int, path: Path) -> np.ndarray:
    """The mean of the channels [n, channels], where all are finite; position: of the first."""
    mono = frames.mean(axis=1, dtype=np.float32)
    finite = np.isfinite(mono)
    if not finite.all():
        bad = position + int(np.argmin(finite))
        raise UserError(f"{path}: sample {bad} is not finite; write the file again")
    return mono


def _resampled(stretches: Iterator[np.ndarray], rate: int, path: Path) -> Iterator[np.ndarray]:
    stream = needed("soxr", path).ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for samples in stretches:
        yield stream.resample_chunk(samples)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _refuse_cut_short(path: Path) -> None:
    """Raise `UserError` where a WAV file ends before its samples do, which libsndfile lets pass.

    Sizes of 0 and of all ones are those of programs that did not know the length.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(0)
            if file.read(4) != b"RIFF":  # RF64 and others, which libsndfile judges
                return
            file.seek(12)
            while len(header := file.read(8)) == 8:
                name, size = struct.unpack("<4sI", header)
                if name == b"data" and size in (0, 0xFFFFFFFF):
                    return
                if file.tell() + size > end:
                    raise UserError(
                        f"{path}: cut short: {size:,} bytes of {name.decode('latin-1').strip()!r}"
                        f" are promised and {end - file.tell():,} are there; get the file again"
                    )
                if name == b"data":
                    return
                file.seek(size + size % 2, 1)
            raise UserError(f"{path}: the WAV file has no samples; get the file again")
    except OSError as error:
        raise unreadable(error, path) from error
