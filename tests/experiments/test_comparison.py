"""Comparisons: the same batches for all, budgets that end, parity as a slow search finds it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training import runs
from wavelet_lm.data.dataset import prepare_data
from wavelet_lm.errors import UserError
from wavelet_lm.experiments import comparison
from wavelet_lm.experiments.comparison import AXES, Budget, best, compare, reached, summary
from wavelet_lm.models.cost import breakdown
from wavelet_lm.training import loop
from wavelet_lm.training.run import train
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.schedule import learning_rate

SHORT = {"max_steps": 5, "eval_interval": 2, "heads": 2, "head_hidden": 0, "layers": 2}


@pytest.fixture
def config(tmp_path, monkeypatch):
    # Among thousands of tests there is much to look through, and nothing in the way.
    monkeypatch.setattr(comparison, "forget_the_last_run", lambda: None)
    return runs.run_config(tmp_path, **SHORT)


@pytest.fixture
def data(config):
    return prepare_data(config, log=lambda message: None)


def quiet(message):
    pass


def test_every_model_reads_the_same_batches(config, data, monkeypatch):
    read: list[list[torch.Tensor]] = []
    update = comparison.ComparedTrainer._update

    def recorded(trainer):
        if trainer.progress.step == 0:
            read.append([])
        read[-1] += [part for pair in trainer.task.batch(trainer.progress.step) for part in pair]
        update(trainer)

    monkeypatch.setattr(comparison.ComparedTrainer, "_update", recorded)
    shape = {"micro_batch_size": 3, "grad_accum": 2, "max_steps": 3, "eval_interval": 9}
    names = {"gpt": "gpt", "haar": "wavelet_gpt", "lm": "wavelet_lm"}
    configs = {name: config.replace(model=model, **shape) for name, model in names.items()}
    rows = compare(configs, data, None, [0.01, 0.001], [1, 2], log=quiet)
    members = [(row["seed"], row["model"], row["lr"]) for row in rows]
    assert members == list(itertools.product((1, 2), names, (0.01, 0.001)))
    assert [len(batches) for batches in read] == [3 * 2 * 2] * 12
    assert read[0][0].shape == (3, 16)
    first, second = read[:6], read[6:]
    for same in (first, second):
        for batches in same:
            assert all(map(torch.equal, batches, same[0]))
    assert not torch.equal(first[0][0], second[0][0])


def test_a_compared_run_is_that_of_train(config, data):
    config = config.replace(dropout_mlp=0.3)  # warming up draws random numbers too
    (row,) = compare({"wavelet_lm": config}, data, None, [0.02], [7], log=quiet)
    plain = RunFolder(train(config.replace(lr=0.02, seed=7)).path).metrics()
    losses = [(r["step"], round(r["val_loss"], 5)) for r in plain if r["event"] == "eval"]
    assert [(p["step"], p["valid_loss"]) for p in row["curve"]] == losses
    train_losses = [r["loss"] for r in plain if r["event"] == "train"]
    assert len(train_losses) == 5
    assert row["curve"][0]["train_loss"] is None
    for point, mean in zip(row["curve"][1:], ([0, 1], [2, 3], [4]), strict=True):
        expected = np.mean([train_losses[i] for i in mean])
        assert point["train_loss"] == pytest.approx(expected, abs=1e-5)
    flops = breakdown(config, data.tokenizer.vocab_size).total.flops * 2 * 16
    assert [p["flops"] for p in row["curve"]] == [0, 2 * flops, 4 * flops, 5 * flops]
    assert row["curve"][-1]["epoch"] == pytest.approx(5 * 32 / len(data.train.tokens), abs=1e-5)
    assert row["curve"][-1]["seconds"] == row["seconds"] > 0


# --- budgets -------------------------------------------------------------------------------------


def test_steps_and_flops(config, data):
    vocab_size = data.tokenizer.vocab_size
    configs = {"gpt": config.replace(model="gpt"), "wavelet_lm": config}
    costs = [breakdown(c, vocab_size).total.flops * 2 * 16 for c in configs.values()]
    for budget, steps in [
        (Budget("steps", 3), [3, 3]),
        (Budget("flops", 4.5 * costs[1]), [int(4.5 * costs[1] // cost) for cost in costs]),
    ]:
        rows = compare(configs, data, budget, [0.01], [1], log=quiet)
        assert [row["steps"] for row in rows] == steps
        assert [row["flops"] for row in rows] == [n * c for n, c in zip(steps, costs, strict=True)]
        assert [row["curve"][-1]["step"] for row in rows] == steps
    with pytest.raises(UserError, match="less than one step"):
        compare(configs, data, Budget("flops", costs[1] - 1), [0.01], [1], log=quiet)


@pytest.mark.parametrize("durations", [[1.0] * 40, [0.5, 2.5, 1.0, 1.5] * 10])
def test_seconds_end_with_the_first_step_past_them(config, data, monkeypatch, durations):
    ticks = itertools.accumulate(itertools.chain(*((0.0, d) for d in durations)))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    before = SimpleNamespace(perf_counter=iter(range(100)).__next__)  # a second for warming up
    monkeypatch.setattr(comparison, "time", before)
    rates = []
    monkeypatch.setattr(
        loop, "learning_rate", lambda *arguments: rates.append(learning_rate(*arguments)) or 0.0
    )
    budget = Budget("seconds", 20.5)
    (row,) = compare({"wavelet_lm": config}, data, budget, [0.01], [1], log=quiet)
    elapsed = list(itertools.accumulate(durations))
    steps = next(i + 1 for i, seconds in enumerate(elapsed) if seconds >= 20.5)
    assert row["steps"] == steps == row["curve"][-1]["step"]
    assert row["seconds"] == elapsed[steps - 1]
    assert [p["seconds"] for p in row["curve"]] == [
        elapsed[p["step"] - 1] if p["step"] else 0 for p in row["curve"]
    ]
    # Warming up, then down to the end of the cosine when the time is over.
    assert rates[0] < max(rates) == pytest.approx(0.01, rel=0.1)
    assert rates[-1] < 0.002 and config.min_lr == 2e-4


@pytest.mark.parametrize(
    "text", ["", "2000", "steps", "steps:", "steps:0", "steps:2.5", "steps:x", "seconds:-1"]
)
def test_bad_budgets(text):
    with pytest.raises(UserError, match="it must be steps:N, seconds:N or flops:N"):
        Budget.parse(text)


def test_good_budgets():
    assert Budget.parse("steps:2000") == Budget("steps", 2000)
    assert Budget.parse("seconds:0.5").steps(10) is None
    assert Budget.parse("flops:1e3").steps(300) == 3


# --- parity --------------------------------------------------------------------------------------


def curve(losses, step=10):
    axes = {"epoch": 0.5, "seconds": 3.0, "flops": 1e6}
    return [
        {"step": i * step, "valid_loss": loss, **{k: i * step * v for k, v in axes.items()}}
        for i, loss in enumerate(losses)
    ]


losses = st.lists(st.integers(0, 40).map(lambda n: n / 8), min_size=1, max_size=8)


@given(losses, st.integers(0, 40).map(lambda n: n / 8))
def test_parity_is_what_a_slow_search_finds(values, target):
    points = curve(values)
    fine = np.linspace(0, 10 * (len(values) - 1), 2000 * (len(values) - 1) + 1)
    line = np.interp(fine, [p["step"] for p in points], values)
    # Where two validations meet the target exactly, rounding must not hide it.
    below = [step for step, loss in zip(fine, line, strict=True) if loss <= target + 1e-12]
    found = reached(points, target)
    if not below:
        assert found is None
        return
    assert set(found) == set(AXES)
    assert found["step"] == pytest.approx(below[0], abs=0.0051)
    for axis, per_step in (("epoch", 0.5), ("seconds", 3.0), ("flops", 1e6)):
        assert found[axis] == pytest.approx(per_step * found["step"])


def run(model, seed, lr, values, milliseconds=10.0):
    costs = {
        "n_params": 5,
        "train_loss": values[-1] / 2,
        "flops_per_token": 7,
        "tokens_per_second": 100.0,
    }
    row = {"model": model, "seed": seed, "lr": lr, "steps": 20, "seconds": 60.0, "flops": 2e7}
    row |= {"valid_loss": values[-1], "curve": curve(values), "step_milliseconds": milliseconds}
    return row | costs


def test_summary_of_several_rates_and_seeds():
    rows = [
        run("a", 1, 0.1, [5, 4, 3]),
        run("a", 1, 0.2, [5, 4, 2.9]),
        {"model": "b", "seed": 1, "lr": 0.1, "diverged": "it did"},
        run("b", 1, 0.2, [5, 3, 1], 20.0),
        run("a", 2, 0.1, [5, 4, 2]),
        run("a", 2, 0.2, [5, 4, 3.5]),
        run("b", 2, 0.1, [5, 1, 0]),
        run("b", 2, 0.2, [5, 2, 1], 30.0),
        {"model": "c", "seed": 1, "lr": 0.1, "diverged": "it did"},
    ]
    a, b, c = summary(rows)
    assert a["train_loss"] == 1.25
    assert (a["lr"], a["n_runs"], a["valid_loss"], a["valid_losses"]) == (0.1, 4, 2.5, [3, 2])
    assert (a["relative_step_time"], a["parity"]["step"]) == (1, 20)
    # b at 0.1 diverged once. It reaches 3 after 10 steps, and 2 after 10.
    assert (b["lr"], b["n_runs"], b["valid_loss"]) == (0.2, 4, 1)
    assert b["relative_step_time"] == 2.5
    assert b["parity"] == {"step": 10, "epoch": 5, "seconds": 30, "flops": 1e7}
    assert c == {"model": "c", "n_runs": 1, "diverged": "it did"}
    # Cut off in the second seed, the rates that have both are the ones to choose from.
    assert best([row for row in rows[:5] if row["model"] == "a"]) == [rows[0], rows[4]]
    slower = run("b", 2, 0.2, [5, 4, 2.5])
    assert summary([*rows[:7], slower])[1]["parity"] is None
    alone = summary([rows[8], rows[0]])
    assert alone[1]["parity"] is None and alone[1]["relative_step_time"] is None


def test_a_run_that_diverges_is_a_row(config, data):
    finished = []
    configs = {"gpt": config.replace(model="gpt", grad_clip=0)}
    rows = compare(configs, data, None, [1e9, 0.01], [1], finished=finished.append, log=quiet)
    assert finished == rows
    assert rows[0]["diverged"].startswith("training diverged: the loss ")
    assert summary(rows)[0]["lr"] == 0.01
