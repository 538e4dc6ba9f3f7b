"""CIFAR-10 in the binary version, written here: pixels, labels, faults."""

import pickle

import numpy as np
import pytest

from wavelet_lm.data.tasks import pixels
from wavelet_lm.errors import UserError


def images(n: int, seed: int = 0) -> np.ndarray:
    """Random records [n, 3073], all labels among them."""
    records = np.random.default_rng(seed).integers(256, size=(n, pixels.RECORD), dtype=np.uint8)
    records[:, 0] = np.arange(n) % 10
    return records


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cifar-10-batches-bin"
    path.mkdir()
    for i in range(2):
        images(50, seed=i).tofile(path / f"data_batch_{i + 1}.bin")
    images(20, seed=2).tofile(path / "test_batch.bin")
    return path


def test_pixels_run_row_by_row(folder):
    (record, *_) = images(20, seed=2)
    image = record[1:].reshape(3, 32, 32).astype(int)
    grey, rgb = [], []
    for row in range(32):
        for column in range(32):
            r, g, b = image[:, row, column]
            grey.append(int((0.2989 * r + 0.587 * g + 0.114 * b) / 255 * 255.5))
            rgb += [r, g, b]
    for name, expected in (("grey", grey), ("rgb", rgb)):
        task = pixels.load(folder, seed=1, pixels=name)
        assert task.longest == len(expected) == task.test.lengths.min()
        assert task.test.sequence(0).tolist() == expected
        assert task.test.labels.tolist() == [i % 10 for i in range(20)]


def test_splits(folder):
    task = pixels.load(folder.parent, seed=1)  # the folder in which it was unpacked does too
    assert (task.vocab_size, task.n_classes) == (256, 10)
    assert sorted(task.valid.labels) == list(range(10))
    whole = {
        pixels.luma(record[None, 1:].reshape(1, 3, -1)).tobytes()
        for record in np.concatenate([images(50), images(50, seed=1)])
    }
    train, valid = (
        {part.sequence(i).tobytes() for i in range(len(part))} for part in (task.train, task.valid)
    )
    assert (len(train), len(valid)) == (90, 10)
    assert train | valid == whole


def test_faults_are_one_line(folder):
    def refused(*words):
        with pytest.raises(UserError) as error:
            pixels.load(folder, seed=1)
        message = str(error.value)
        assert "\n" not in message
        assert all(word in message for word in words), message

    first, test = folder / "data_batch_1.bin", folder / "test_batch.bin"
    records = images(50)
    records[7, 0] = 10
    records.tofile(first)
    refused("data_batch_1.bin, image 8", "label is 10")
    first.write_bytes(images(50).tobytes()[:-1])
    refused("data_batch_1.bin", "153649 bytes", "cifar-10-binary.tar.gz")
    first.write_bytes(b"")
    refused("data_batch_1.bin", "0 bytes")
    first.unlink()
    first.mkdir()
    refused("data_batch_1.bin", "cannot be read")
    test.unlink()
    refused("no test_batch.bin", "170 MB", "--data data/cifar-10-batches-bin")


def test_a_batch_that_is_missing_in_between_is_named(folder):
    images(50).tofile(folder / "data_batch_4.bin")
    with pytest.raises(UserError, match=r"there is no data_batch_3\.bin"):
        pixels.load(folder, seed=1)


def test_the_pickled_version_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pickled; download cifar-10-binary\.tar\.gz"):
        pixels.load(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"does not exist; download cifar-10-binary\.tar\.gz"):
        pixels.load(tmp_path / "nowhere", seed=1)
