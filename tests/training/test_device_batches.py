"""Batches come in time, each of them once, and the one that is asked for."""

import torch

from wavelet_lm.training.device_batches import DeviceBatches


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
