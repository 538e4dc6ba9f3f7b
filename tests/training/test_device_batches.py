"""Batches come in time, each of them once, and the one that is asked for."""

import contextlib

import torch

from wavelet_lm.training import device_batches
from wavelet_lm.training.device_batches import DeviceBatches, to_device


def test_a_batch_is_read_once_and_before_it_is_needed():
    read = []

    def batch(step):
        read.append(step)
        return [(torch.tensor([step, i]), torch.tensor(step)) for i in range(2)]

    batches = DeviceBatches(batch, torch.device("cpu"))
    batches.fetch(3)
    for step in (3, 4, 5):
        parts = batches[step]
        assert [inputs.tolist() for inputs, _ in parts] == [[step, 0], [step, 1]]
        batches.fetch(step + 1)
        assert read == list(range(3, step + 2))
    assert batches[0][1][1].item() == 0  # another than the one that was fetched


def test_on_a_gpu_a_batch_is_copied_on_a_stream_of_its_own(monkeypatch):
    """Without a GPU: what is asked of the streams, in order."""
    said = []

    class Copy:
        def __init__(self, name):
            self.name = name

        def record_stream(self, stream):
            said.append(f"{self.name} is used by {stream}")

    class Computing:
        def wait_stream(self, stream):
            said.append(f"wait for {stream}")

        def __str__(self):
            return "computing"

    @contextlib.contextmanager
    def stream(name):
        said.append(f"on {name}")
        yield
        said.append("back")

    def copied(tensor, device):
        said.append(f"copy {tensor}")
        return Copy(tensor)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"the copies' of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computing())
    monkeypatch.setattr(device_batches, "to_device", copied)
    batches = DeviceBatches(lambda step: [("a", "b")], torch.device("cuda:0"))
    batches.fetch(7)
    assert said == ["on the copies' of cuda:0", "copy a", "copy b", "back"]
    assert [t.name for t in batches[7][0]] == ["a", "b"]
    assert said[4:] == [
        "wait for the copies' of cuda:0",
        "a is used by computing",
        "b is used by computing",
    ]


def test_what_goes_to_a_gpu_is_pinned_in_one_piece(monkeypatch):
    """`copy_` would first copy a tensor with gaps to memory that is not pinned, and wait."""
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    windows = torch.arange(12).view(3, 4)
    sent = to_device(windows[:, :-1], torch.device("cuda"))
    assert pinned[0].is_contiguous()
    assert torch.equal(sent, windows[:, :-1])
