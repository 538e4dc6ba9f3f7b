"""Windows that several processes share are scored once, and their sums are those of one process."""

import json

import numpy as np
import pytest
import torch

from tests.training import runs
from tests.training.several import ended, started
from wavelet_lm.evaluation.likelihood import score
from wavelet_lm.training.run import train


class Rank:
    """One of several processes; `total` waits for nobody and keeps what it was given."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def total(self, values):
        self.given = values
        return values


class Position(torch.nn.Module):
    """Whose loss of a target is the target itself."""

    def token_losses(self, idx, targets):
        return targets.float()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [4, 8])
def test_every_target_is_scored_by_one_process(size, stride):
    tokens = np.arange(101)
    options = {"block_size": 8, "stride": stride, "batch_size": 2, "device": torch.device("cpu")}
    whole = score(Position(), tokens, **options)
    assert whole == (sum(range(1, 101)), 100)
    parts = [score(Position(), tokens, **options, among=Rank(r, size)) for r in range(size)]
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    run = train(runs.run_config(tmp_path, max_steps=4)).path
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = runs.finished(run, "--json", one, "--device", "cpu", script="wavelet_lm.evaluation")
    assert done.returncode == 0, done.stderr
    command = ("-m", "wavelet_lm.evaluation", run, "--json", two, "--device", "cpu")
    with started(2, *command) as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1].splitlines()[0] == done.stdout.splitlines()[0]
    assert results[1][1] == ""
    a, b = (json.loads(file.read_text(encoding="utf-8")) for file in (one, two))
    for protocol in ("non_overlapping", "sliding"):
        assert a[protocol]["tokens"] == b[protocol]["tokens"]
        assert a[protocol]["nll"] == pytest.approx(b[protocol]["nll"], rel=1e-12)
