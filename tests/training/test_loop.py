"""The loop: accumulation, bookkeeping of evaluations and checkpoints, and loss that diverges."""

import math

import numpy as np
import pytest
import torch

from tests.training import runs
from tests.training.test_resume import before_step, found
from wavelet_lm.data.batches import validation_batches
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint, load_own_model
from wavelet_lm.training.language import LanguageModelling
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.report import Diverged
from wavelet_lm.training.run import train
from wavelet_lm.training.run_folder import RunFolder

NO_DROPOUT = dict.fromkeys(
    (
        "dropout_embedding",
        "dropout_mixer",
        "dropout_projection",
        "dropout_mlp",
        "dropout_lm_head",
    ),
    0.0,
)


def steps(run, event):
    return [row["step"] for row in RunFolder(run).metrics() if row["event"] == event]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(folder, **overrides):
    return train(runs.run_config(folder, **overrides)).path


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, monkeypatch, order):
    """The gradient of 4 micro-batches of 2 windows against that of all 8 windows at once."""
    seen = []

    def compare(trainer):
        trainer.task.model.loss(*trainer.task.windows[0])[0].backward()
        seen.append(gradients(trainer.task.model))
        trainer.optimizer.zero_grad()

    def keep(precision, optimizer, model, clip):
        seen.append(gradients(model))

    before_step(monkeypatch, 0, compare)
    monkeypatch.setattr("wavelet_lm.training.precision.Precision.update", keep)
    trained(
        tmp_path,
        **NO_DROPOUT,
        data_order=order,
        decompose_bypass_cross_window=False,
        grad_accum=4,
        max_steps=1,
    )
    large, accumulated = seen
    assert large.keys() == accumulated.keys()
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_a_memory_setting_changes_neither_batches_nor_validation(tmp_path, monkeypatch, order):
    """8 windows at once, twice 4 and four times 2: the same windows in the same step."""
    read, validated = [], []
    real = LanguageModelling.losses

    def recorded(task, step, batch):
        read[-1].append(torch.cat([inputs for inputs, _ in batch]))
        assert {len(inputs) for inputs, _ in batch} == {task.config.micro_batch_size}
        return real(task, step, batch)

    monkeypatch.setattr(LanguageModelling, "losses", recorded)
    losses = []
    for micro, accum in ((8, 1), (4, 2), (2, 4)):
        folder = tmp_path / str(micro)
        folder.mkdir()
        read.append([])
        shape = {"micro_batch_size": micro, "grad_accum": accum, "max_steps": 3, "lr": 1e-3}
        run = trained(folder, **NO_DROPOUT, **shape, data_order=order, eval_interval=1)
        rows = RunFolder(run).metrics()
        losses.append([row["val_loss"] for row in rows if row["event"] == "eval"])
        config = runs.run_config(folder, **shape)
        windows = validation_batches(config, np.arange(2000))
        assert all(len(inputs) <= micro for inputs, _ in windows)
        validated.append(torch.cat([inputs for inputs, _ in windows]))
    for other in (1, 2):
        assert len(read[other]) == 3
        assert all(torch.equal(a, b) for a, b in zip(read[0], read[other], strict=True))
        assert torch.equal(validated[0], validated[other])
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)


def test_the_carry_of_a_window_is_the_mean_of_the_window_before(tmp_path, monkeypatch):
    """Row by row through the whole text, and zero where it starts again."""
    seen = []
    real = LanguageModelling.losses

    def watched(task, step, batch):
        loss = task.loss_function

        def spy(inputs, targets, start):
            seen.append((inputs, start.mean))
            result = loss(inputs, targets, start)
            seen[-1] += (result[1][-1].mean,)
            return result

        task.loss_function = spy
        try:
            yield from real(task, step, batch)
        finally:
            task.loss_function = loss

    monkeypatch.setattr(LanguageModelling, "losses", watched)
    (tmp_path / "words.txt").write_text(runs.some_text(90), encoding="utf-8")
    trained(tmp_path, data_order="sequential", grad_accum=2, max_steps=12)
    # Two micro-batches take turns, each with its own rows of the text.
    n = next(i for i in range(2, 24, 2) if torch.equal(seen[i][0], seen[0][0]))
    assert 2 < n < 20
    for i, (_, carry, _) in enumerate(seen):
        if i % n < 2:
            assert not carry.any()
        else:
            before = seen[i - 2][2]
            torch.testing.assert_close(carry, before.total / before.count[:, None])
            assert carry.any()


def test_the_log_interval_and_the_evaluations(tmp_path):
    run = trained(tmp_path, max_steps=23, log_interval=5, eval_interval=10, save_interval=7)
    assert steps(run, "train") == [1, 5, 10, 15, 20]
    assert steps(run, "eval") == [0, 10, 20, 23]
    assert steps(run, "test") == steps(run, "end") == [23]
    assert Checkpoint(run / "last.safetensors").metadata["step"] == 23


def test_each_line_has_the_rate_of_its_update(tmp_path, monkeypatch):
    used = []
    real = Optimizer.set_lr
    monkeypatch.setattr(Optimizer, "set_lr", lambda o, lr: used.append(lr) or real(o, lr))
    run = trained(tmp_path, max_steps=12)
    assert [row["lr"] for row in runs.figures(run) if row["event"] == "train"] == used
    assert used[0] == pytest.approx(0.01)
    assert used[-1] == pytest.approx(2e-4)


CARRYING = {"data_order": "sequential", "carry_state": True}
FAMILY = {
    "memories": {"delta_memory": True, "fwpkm_enabled": True, "fwpkm_num_keys": 9},
    "mean": {"decompose_bypass": True, "decompose_bypass_cross_window": True},
    "cells": {"multinodal_enabled": True, "multinodal_num_cells": 2, "multinodal_cell_dim": 8},
}


@pytest.mark.parametrize("name", FAMILY)
def test_windows_that_carry_the_state_are_read_as_one_text(name, tmp_path, monkeypatch):
    """Of weights that stand still, the loss of a window is that of the whole text there."""
    seen = []
    real = LanguageModelling.losses

    def watched(task, step, batch):
        seen.append((task.model, torch.cat([inputs for inputs, _ in batch])))
        for loss, (inputs, targets) in zip(real(task, step, batch), batch, strict=True):
            seen[-1] += (float(loss.detach()),)
            assert inputs.shape == targets.shape
            yield loss

    monkeypatch.setattr(LanguageModelling, "losses", watched)
    (tmp_path / "words.txt").write_text(runs.some_text(90), encoding="utf-8")
    still = {"lr": 1e-30, "min_lr": 1e-30, "grad_accum": 2, "max_steps": 4}
    trained(tmp_path, **NO_DROPOUT, **CARRYING, **FAMILY[name], **still)
    model = seen[0][0].train()  # in which a memory does not learn from what it reads
    text = torch.cat([inputs for _, inputs, *_ in seen], dim=1)
    T = seen[0][1].shape[1]
    logits = model(text[:, :-1])[0].detach()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), text[:, 1:], reduction="none"
    )
    for step in range(3):
        of_step = losses[:, step * T : (step + 1) * T].chunk(2)
        assert seen[step][2:] == pytest.approx([float(part.mean()) for part in of_step], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        ({"max_steps": 1}, [0, 1]),
        ({"max_steps": 4, "eval_interval": 100, "save_interval": 100}, [0, 4]),
        ({"max_steps": 4, "warmup_fraction": 1, "eval_interval": 1}, [0, 1, 2, 3, 4]),
        ({"max_steps": None, "epochs": 0.05}, [0, 5]),
        ({"max_steps": None, "epochs": 1e-6}, [0, 1]),
    ],
)
def test_short_runs_end_with_a_best_checkpoint(tmp_path, overrides, evaluations):
    run = trained(tmp_path, **overrides)
    assert steps(run, "eval") == evaluations
    assert Checkpoint(run / "best.safetensors").metadata["step"] >= 1
    assert steps(run, "end") == evaluations[-1:]


@pytest.mark.parametrize(("skip", "expected"), [(True, 20), (False, 10)])
def test_no_best_in_warmup_unless_wanted(tmp_path, monkeypatch, skip, expected):
    """Validation losses that only rise: the first one that counts stays the best."""
    monkeypatch.setattr(Trainer, "validate", found(lambda step: 1 + step / 100))
    run = trained(tmp_path, warmup_fraction=0.5, skip_warmup_saves=skip)
    metadata = Checkpoint(run / "best.safetensors").metadata
    assert metadata == {"step": expected, "val_loss": 1 + expected / 100}


def test_the_validation_loss_is_that_of_the_model_without_dropout(tmp_path):
    run = trained(tmp_path)
    rows = [row for row in RunFolder(run).metrics() if row["event"] == "eval"]
    best = min(rows[1:], key=lambda row: row["val_loss"])
    checkpoint = Checkpoint(run / "best.safetensors")
    assert checkpoint.metadata == {"step": best["step"], "val_loss": best["val_loss"]}
    model = load_own_model(run)
    data = torch.tensor(list((tmp_path / "words.txt").read_bytes()))
    data = data[int(0.9 * len(data)) : int(0.95 * len(data))]
    letters = sorted(set(runs.some_text()))
    ids = torch.tensor([letters.index(chr(x)) for x in data])
    starts = torch.linspace(0, len(ids) - 1 - 16, 4, dtype=torch.float64).long()
    windows = torch.stack([ids[s : s + 17] for s in starts])
    with torch.no_grad():
        logits, _ = model(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert loss.item() == pytest.approx(best["val_loss"], rel=1e-5)
    assert best["bits_per_byte"] == pytest.approx(best["val_loss"] / math.log(2), rel=1e-12)


def test_it_learns(tmp_path):
    metrics = RunFolder(trained(tmp_path, max_steps=150)).metrics()
    rows = [row for row in metrics if row["event"] == "eval"]
    assert rows[-1]["val_loss"] < 0.6 * rows[0]["val_loss"]


# --- divergence ----------------------------------------------------------------------------------


def last_words(folder, **overrides):
    with pytest.raises(Diverged) as caught:
        trained(folder, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    run = runs.only_run(folder)
    for file in run.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in runs.tensors(file).values())
        assert f"{file} (step {Checkpoint(file).metadata['step']})" in message
    return message


def poke(value, parameter):
    """Set one weight, as a broken step would."""

    def poked(trainer):
        with torch.no_grad():
            dict(trainer.task.model.named_parameters())[parameter].view(-1)[0] = value

    return poked


@pytest.mark.parametrize("step", [3, 19, 20, 39])
def test_a_nan_weight_stops_the_run_and_reaches_no_file(tmp_path, monkeypatch, step):
    before_step(monkeypatch, step, poke(float("nan"), "final_norm.weight"))
    assert f"the loss is nan at step {step + 1} " in last_words(tmp_path)


def test_a_nan_that_no_loss_shows_reaches_no_file_either(tmp_path, monkeypatch):
    """A row of the embedding that no text of this alphabet reads."""
    (tmp_path / "words.txt").write_text(runs.some_text(), encoding="utf-8")
    before_step(monkeypatch, 25, poke(float("nan"), "embedding.weight"))
    message = last_words(tmp_path, tokenizer="bytes")
    assert "the weights are not finite at step 30" in message
    assert "(step 20)" in message


def test_a_rate_that_is_too_high_is_named(tmp_path):
    message = last_words(tmp_path, lr=1e6, min_lr=1e6, warmup_fraction=0)
    assert "the loss is nan at step 2 (learning rate 1e+06); nothing was saved yet" in message
    assert message.endswith("lower lr (1000000.0) or raise warmup_fraction (0.0)")


def test_a_loss_that_explodes_stops(tmp_path, monkeypatch):
    before_step(monkeypatch, 12, poke(1e4, "final_norm.weight"))
    message = last_words(tmp_path)
    assert "the loss exploded to " in message
    assert " at step 13 " in message


def test_a_loss_scale_that_collapsed_stops(tmp_path, monkeypatch):
    """The scale comes to the host with the loss: what is read is that of the step."""

    def collapse(trainer):
        trainer.precision.scaler.value.fill_(2.0**-11)

    before_step(monkeypatch, 4, collapse)
    with pytest.raises(Diverged, match="every fp16 gradient overflows at step 5"):
        trained(tmp_path, max_steps=10)


def test_a_validation_loss_that_is_not_finite_stops(tmp_path, monkeypatch):
    losses = {0: 3.0, 10: 2.0}
    monkeypatch.setattr(Trainer, "validate", found(lambda step: losses.get(step, math.inf)))
    assert "the validation loss is inf at step 20" in last_words(tmp_path)


def test_memory_that_runs_out_names_the_batch_size(tmp_path, monkeypatch):
    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_step(monkeypatch, 2, full)
    with pytest.raises(UserError, match=r"at step 2; lower micro_batch_size \(2\)"):
        trained(tmp_path)
