"""What is read late is what was there when it was sent."""

import torch

from wavelet_lm.training.late_reading import LateReading


def test_later_changes_are_not_read():
    values = torch.tensor([1.5, -2.0])
    reading = LateReading(values)
    values.zero_()
    assert reading.read() == [1.5, -2.0]


class FakeTensor:
    """Of a GPU that is not there: it says what is asked of it."""

    shape, dtype, device = (2,), torch.float32, torch.device("cuda:1")


def test_on_a_gpu_it_waits_for_an_event_of_its_stream_alone(monkeypatch):
    said = []

    class Event:
        def record(self, stream):
            said.append(f"record on {stream}")

        def synchronize(self):
            said.append("wait")

    class Host:
        def copy_(self, values, non_blocking):
            said.append(f"copy, non_blocking {non_blocking}")

        def tolist(self):
            return [3.0, 1.0]

    def empty(shape, dtype, pin_memory):
        assert pin_memory
        return Host()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    reading = LateReading(FakeTensor())
    assert said == ["copy, non_blocking True", "record on that of cuda:1"]
    assert reading.read() == [3.0, 1.0]
    assert said[2:] == ["wait"]
