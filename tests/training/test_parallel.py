"""Several processes train as one does: the same losses, however they share the model."""

import json
from pathlib import Path

import pytest

from tests.training import runs
from tests.training.several import ended, go_on, job, run_job, started, train_together
from wavelet_lm.training.run_folder import RunFolder

SEQUENTIAL = {"data_order": "sequential", "decompose_bypass_cross_window": True}
# Adam makes steps of any gradient, of one that is rounding alone, too, unless its epsilon is above.
ADAMW = {"optimizer": "AdamW", "optimizer_eps": 1e-5}
# Each with what another has not: order, optimizer, memories, tied and shared weights.
MODELS = {
    "headline": {"fwpkm_enabled": True, "fwpkm_num_keys": 9, "sample_interval": 3},
    "delta": {
        "delta_memory": True,
        **ADAMW,
        "lr": 0.001,
        "tie_embedding_to_lm_head": True,
        "gradient_checkpointing": True,
        **SEQUENTIAL,
    },
    "loops": {
        "looped_blocks": True,
        "looped_blocks_count": 2,
        "loop_iterations": 2,
        "learned_residual": True,
        "weight_decay_mode": "decoupled",
    },
    "cells": {
        "multinodal_enabled": True,
        "multinodal_num_cells": 2,
        "multinodal_cell_dim": 8,
        "multinodal_cross_cell_gating": True,
        "multinodal_cross_cell_gate_interval": 1,
        "shared_lifting_weights": False,
        **SEQUENTIAL,
    },
    "gpt": {"model": "wavelet_gpt", "heads": 2, **ADAMW},
}
# A delta memory grows what rounding differs by, at ten times that rate to hundredths in 50 steps.
WITHIN = {"delta": 1e-3}


def losses(folder: Path) -> list[tuple]:
    """Event, step and loss of every line of a run."""
    rows = runs.figures(runs.only_run(folder))
    return [(row["event"], row["step"], row.get("loss", row.get("val_loss"))) for row in rows]


def watched(folder: Path) -> tuple[list[float], list[float], list[int]]:
    """Norms of the gradients, weights and lags of all scales, and the steps of samples."""
    rows = RunFolder(runs.only_run(folder)).metrics()
    blocks = [block for row in rows if row["event"] == "scales" for block in row["blocks"]]
    weights = [weight for block in blocks for weight in block["weights"]]
    lags = [lag for block in blocks for lags in block["lags"] for lag in lags]
    samples = [row["step"] for row in rows if row["event"] == "sample"]
    return [row["grad_norm"] for row in rows if "grad_norm" in row], weights + lags, samples


def assert_same(folder: Path, other: Path, within: float = 1e-5) -> None:
    expected, found = losses(folder), losses(other)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], abs=within)


def compare(folder: Path, steps: int, sizes: tuple[int, ...], models: dict) -> None:
    for name, overrides in models.items():
        run_job(job(folder / name / "alone", steps, **overrides))
    for size in sizes:
        jobs = [
            job(folder / name / f"{kind}{size}", steps, parallel=kind, **overrides)
            for name, overrides in models.items()
            for kind in ("ddp", "fsdp")
        ]
        train_together(size, folder, jobs)
        for name in models:
            for kind in ("ddp", "fsdp"):
                other = folder / name / f"{kind}{size}"
                assert_same(folder / name / "alone", other, WITHIN.get(name, 1e-5))
                for a, b in zip(watched(folder / name / "alone"), watched(other), strict=True):
                    assert b == pytest.approx(a, rel=1e-3)


def test_two_processes_have_the_losses_of_one(tmp_path):
    compare(tmp_path, 6, (2,), {name: MODELS[name] for name in ("headline", "cells")})


def test_a_run_goes_on_with_other_numbers_of_processes_and_another_parallel(tmp_path):
    """1 → 2 (ddp) → 2 (fsdp) → 1, with optimizer state, carry, memories and tied weights."""
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    run_job(job(whole, 12, **MODELS["delta"]))
    run_job({**job(chain, 12, **MODELS["delta"]), "stop": 2})
    train_together(2, tmp_path, [go_on(chain, "ddp", 5), go_on(chain, "fsdp", 8)])
    run_job(go_on(chain, "auto"))
    assert_same(whole, chain)
    assert not (runs.only_run(chain) / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_process_holds_its_share_of_the_weights(tmp_path, size):
    """The rest is one block, gathered, and what FSDP2 sends and receives, of that size each.

    A step has a share of the gradients and of the sums as well, and what backward keeps.
    """
    with started(size, "-m", "tests.training.shares", "fsdp") as processes:
        for status, out, stderr in ended(processes):
            assert status == 0, stderr
            held = json.loads(out)
            share, block = held["all"] / size, held["block"]
            assert held["weights"] < share + block / 4
            assert held["forward"] < share + 4 * block
            assert held["step"] < 3 * share + 7 * block


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_from_one_to_two_to_four_to_one(tmp_path, name):
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    run_job(job(whole, 50, **MODELS[name]))
    run_job({**job(chain, 50, **MODELS[name]), "stop": 10})
    train_together(2, tmp_path, [go_on(chain, "ddp", 18), go_on(chain, "fsdp", 25)])
    train_together(4, tmp_path, [go_on(chain, "fsdp", 32), go_on(chain, "ddp", 40)])
    run_job(go_on(chain, "auto"))
    assert_same(whole, chain, WITHIN.get(name, 1e-5))


@pytest.mark.slow
def test_losses_are_the_same_over_fifty_steps(tmp_path):
    compare(tmp_path, 50, (2, 4), MODELS)
