"""FSD-50K: sounds and the classes that they belong to, 200 of them, any number per clip.

Source: Fonseca et al., "FSD50K: an Open Dataset of Human-Labeled Sound Events", 2022. Its folder,
as it is published:

    FSD50K.ground_truth/   vocabulary.csv (number, label, mid; without a header),
                           dev.csv (fname, labels, mids, split), eval.csv (fname, labels, mids)
    FSD50K.dev_audio/      FNAME.wav; split `train` of dev.csv is trained on, `val` validates
    FSD50K.eval_audio/     FNAME.wav, the test split

A clip of up to 30 s is read as pieces of 1 s at 16 kHz, each with all labels of its clip.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.data.files import only_one
from wavelet_lm.data.modalities.audio import SAMPLE_RATE, n_seconds, samples_between
from wavelet_lm.data.tasks.examples import Batch
from wavelet_lm.data.tasks.tables import read_table
from wavelet_lm.errors import UserError

PIECE = SAMPLE_RATE
DOWNLOAD = (
    "FSD50K (108 hours, about 34 GB unpacked) is record 4060432 on zenodo.org; unpack its parts"
    " FSD50K.ground_truth, FSD50K.dev_audio and FSD50K.eval_audio into one folder and give that"
)


@dataclass(frozen=True)
class Clip:
    """A sound file. labels: numbers of its classes; seconds: how long it lasts."""

    file: Path
    labels: tuple[int, ...]
    seconds: float

    @property
    def n_pieces(self) -> int:
        """Whole seconds, a rest of half a second or more among them, and 1 at least."""
        return max(1, round(self.seconds))


class ClipExamples:
    """Pieces of 1 s, read from the files when they are asked for.

    Args:
        clips: what they are cut from.
        n_classes: of all clips.
        patch: samples of a position of the model.

    Attributes:
        lengths: [N] positions of each piece that hold sound, 1 or more.
        labels: [N, n_classes] of 0 and 1.
        clip_of: [N], which clip a piece is from.
    """

    def __init__(self, clips: Sequence[Clip], n_classes: int, patch: int):
        self.clips, self.patch = list(clips), patch
        self.clip_of = np.repeat(np.arange(len(clips)), [clip.n_pieces for clip in clips])
        self.starts = np.concatenate([np.arange(clip.n_pieces) for clip in clips])
        samples = np.array([round(clip.seconds * SAMPLE_RATE) for clip in clips])[self.clip_of]
        positions = -(-(samples - PIECE * self.starts) // patch)
        self.lengths = np.clip(positions, 1, PIECE // patch)
        self.clip_labels = np.zeros((len(clips), n_classes), np.float32)
        for row, clip in zip(self.clip_labels, clips, strict=True):
            row[list(clip.labels)] = 1

    @cached_property
    def key(self) -> str:
        """What identifies the clips: a hash of names, labels and lengths."""
        rows = [(clip.file.name, clip.labels, clip.seconds) for clip in self.clips]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """[N, n_classes] float32 of 0 and 1: those of each piece's clip."""
        return self.clip_labels[self.clip_of]

    def __len__(self) -> int:
        return len(self.clip_of)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """inputs: [B, 16000] float32 samples, zero where the clip has ended."""
        inputs = np.zeros((len(indices), PIECE), np.float32)
        for row, i in zip(inputs, indices, strict=True):
            samples = samples_between(self.clips[self.clip_of[i]].file, float(self.starts[i]), 1.0)
            row[: len(samples)] = samples
        labels = torch.from_numpy(self.clip_labels[self.clip_of[indices]])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(self.lengths[indices]), labels)


@dataclass(frozen=True)
class SoundTask:
    """classes: their names; longest: positions of a piece."""

    classes: tuple[str, ...]
    longest: int
    train: ClipExamples
    valid: ClipExamples
    test: ClipExamples


def load(folder: Path, patch: int, limit: int | None = None) -> SoundTask:
    """The task in a folder as it is published, or with `dev_audio` for `FSD50K.dev_audio` etc.

    The tables may be TSV files too.

    Args:
        patch: samples of a position of the model.
        limit: the first so many clips of each split; None = all.

    Raises:
        UserError: names the file, and the line of a table, that is not as it should be.
    """
    from tqdm import tqdm

    tables = _part(folder, "ground_truth")
    classes = _vocabulary(_table(tables, "vocabulary"))
    numbers = {name: number for number, name in enumerate(classes)}
    clips: dict[str, list[Clip]] = {"train": [], "val": [], "test": []}
    for table, columns, audio in (
        ("dev", ("fname", "labels", "split"), "dev_audio"),
        ("eval", ("fname", "labels"), "eval_audio"),
    ):
        path, sounds = _table(tables, table), _part(folder, audio)
        rows = tqdm(read_table(path, columns), path.name, unit=" clips", disable=None, leave=False)
        for place, (name, labels, *split) in rows:
            part = split[0] if split else "test"
            if split and part not in ("train", "val"):
                raise UserError(f"{place}: split is {part!r}; it must be train or val")
            if limit is None or len(clips[part]) < limit:
                clips[part].append(_clip(place, sounds / f"{name}.wav", labels, numbers, path))
    for part, found in clips.items():
        if not found:
            raise UserError(f"{tables}: there are no clips of split {part}")
    parts = (ClipExamples(found, len(classes), patch) for found in clips.values())
    return SoundTask(classes, PIECE // patch, *parts)


def _clip(place: str, file: Path, labels: str, numbers: dict[str, int], table: Path) -> Clip:
    names = labels.split(",")
    unknown = next((name for name in names if name not in numbers), None)
    if unknown is not None:
        raise UserError(
            f"{place}: label {unknown!r} is not among the {len(numbers)} classes of"
            f" vocabulary{table.suffix}; mend the line"
        )
    if not file.is_file():
        raise UserError(f"{place}: there is no {file}; {DOWNLOAD}")
    seconds = n_seconds(file)
    if seconds == 0:
        raise UserError(f"{file}: holds no samples; get the file again")
    return Clip(file, tuple(numbers[name] for name in names), seconds)


def _part(folder: Path, name: str) -> Path:
    """The subfolder `FSD50K.NAME`, or `NAME`."""
    path = only_one([folder / f"FSD50K.{name}", folder / name])
    if path is not None and path.is_dir():
        return path
    raise UserError(f"{folder}: there is no folder FSD50K.{name}; {DOWNLOAD}")


def _table(folder: Path, name: str) -> Path:
    path = only_one([folder / f"{name}.csv", folder / f"{name}.tsv"])
    if path is not None and path.is_file():
        return path
    raise UserError(f"{folder}: there is no {name}.csv; {DOWNLOAD}")


def _vocabulary(path: Path) -> tuple[str, ...]:
    """The names of the classes by their numbers."""
    names: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise unreadable(error, path) from error
    delimiter = "\t" if path.suffix == ".tsv" else ","
    for number, row in enumerate(csv.reader(lines, delimiter=delimiter)):
        if len(row) < 2 or row[0] != str(number) or not row[1] or row[1] in names:
            raise UserError(
                f"{path}, line {number + 1}: {delimiter.join(row)!r} must be {number}, the name of"
                " a further class, and its mid"
            )
        names.append(row[1])
    return tuple(names)
