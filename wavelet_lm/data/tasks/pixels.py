"""CIFAR-10 as sequences of pixels: the Long Range Arena's image task.

    grey   1024 tokens: the luma of each pixel, row by row, as the arena has it
    rgb    3072 tokens: red, green and blue of each pixel, row by row

A token is a value 0 … 255; all images have one length, so that nothing is padded. Read from the
binary version, in which an image is a label byte and 3 planes of 32 × 32 bytes. The Python version
is a pickle, which runs code of whoever wrote it, and is refused.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.data.tasks.examples import Task, TokenExamples, cut
from wavelet_lm.errors import UserError

VOCAB_SIZE = 256
N_CLASSES = 10
FORMATS = ("grey", "rgb")
SIDE, PLANES = 32, 3
RECORD = 1 + PLANES * SIDE * SIDE
# Grey as TensorFlow makes it, whose conversion the arena uses: the weights of ITU-R BT.601 to four
# digits, and a scale of 255.5 in place of 255 before the fraction is cut off.
LUMA = (0.2989, 0.5870, 0.1140)
SCALE = 255.5 / 255
VALID_SHARE = 0.1
FOLDER = "cifar-10-batches-bin"
DOWNLOAD = (
    "download cifar-10-binary.tar.gz (CIFAR-10 binary version, 170 MB) from"
    " https://www.cs.toronto.edu/~kriz/cifar.html, unpack it in data/ and give"
    f" --data data/{FOLDER}"
)


def load(folder: Path, seed: int, pixels: str = "grey") -> Task:
    """The task; a tenth of the training images, drawn by `seed`, is for validation.

    Raises:
        UserError: files are missing, truncated, pickled, or hold a label above 9.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist; {DOWNLOAD}")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    train = sorted(folder.glob("data_batch_*.bin"))
    test = folder / "test_batch.bin"
    if not train and any(folder.rglob("data_batch_*")):
        raise UserError(f"{folder}: the Python version of CIFAR-10 is pickled; {DOWNLOAD}")
    if not train or not test.is_file():
        name = "test_batch.bin" if train else "data_batch_1.bin"
        raise UserError(f"{folder}: there is no {name}; {DOWNLOAD}")
    for number in range(1, len(train) + 1):
        if folder / f"data_batch_{number}.bin" not in train:
            raise UserError(f"{folder}: there is no data_batch_{number}.bin; {DOWNLOAD}")
    trained, valid = cut(_read(train, pixels), (1 - VALID_SHARE, VALID_SHARE), seed, folder)
    return Task("image", VOCAB_SIZE, N_CLASSES, trained, valid, _read([test], pixels))


def _read(files: list[Path], pixels: str) -> TokenExamples:
    records = np.concatenate([_records(file) for file in files])
    planes = records[:, 1:].reshape(len(records), PLANES, -1)
    tokens = luma(planes) if pixels == "grey" else planes.transpose(0, 2, 1)
    lengths = np.full(len(records), tokens[0].size)
    return TokenExamples(np.ascontiguousarray(tokens).reshape(-1), lengths, records[:, 0])


def _records(file: Path) -> np.ndarray:
    """The images of one file: uint8 [N, 3073], label first."""
    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise unreadable(error, file) from error
    if not len(data) or len(data) % RECORD:
        raise UserError(
            f"{file}: {len(data)} bytes are no whole number of images of {RECORD}; {DOWNLOAD}"
        )
    records = data.reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= N_CLASSES)
    if len(wrong):
        raise UserError(
            f"{file}, image {wrong[0] + 1}: the label is {records[wrong[0], 0]}; it must be 0 … 9:"
            " get the file again"
        )
    return records


def luma(planes: np.ndarray) -> np.ndarray:
    """Red, green and blue [N, 3, P] -> grey [N, P], uint8."""
    grey = np.empty((planes.shape[0], planes.shape[2]), np.uint8)
    for start in range(0, len(planes), 1000):  # as floats all images would take a gigabyte
        part = planes[start : start + 1000].astype(np.float32)
        grey[start : start + 1000] = SCALE * np.einsum("npx,p->nx", part, LUMA)
    return grey
