"""Several processes train as one does: the same losses, however they share the model."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.training import runs
from tests.training.several import ended, go_on, job, run_job, started, train_together
from wavelet_lm.training.run_folder import RunFolder

SEQUENTIAL = {"data_order": "sequential", "decompose_bypass_cross_window": True}
ADAMW = {"optimizer": "AdamW"}
# Of the recipe, all that says how the model is made and stepped; the rest is as small as it can be.
RECIPE = ("lifting_linear_only", "mixer_transform", "per_scale_mixer_widths", "delta_bands")
RECIPE += ("delta_memory", "delta_after_mixing", "mlp_activation", "cross_scale_gating", "low_rank")
RECIPE += ("decompose_bypass", "decompose_bypass_cross_window", "tie_embedding_to_lm_head")
RECIPE += ("pkm_enabled", "optimizer", "adam_betas", "lr", "min_lr", "weight_decay")
EFFICIENT = json.loads((runs.ROOT / "configs/efficient_cpu.json").read_text(encoding="utf-8"))
DELTA = {"delta_memory": True, "delta_heads": 2, "delta_key_dim": 8, "delta_value_dim": 8}
# Each with what another has not: order, optimizer, memories, tied and shared weights.
MODELS = {
    "headline": {"fwpkm_enabled": True, "fwpkm_num_keys": 9, "sample_interval": 3},
    "delta": {
        **DELTA,
        **ADAMW,
        "tie_embedding_to_lm_head": True,
        "gradient_checkpointing": True,
        **SEQUENTIAL,
        "carry_state": True,
    },
    "efficient": {**{key: EFFICIENT[key] for key in RECIPE}, **DELTA},
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
# AdamW and Muon make whole steps of gradients that are nearly rounding alone, so that what sums
# differ by in another order grows: in float64 it has further to go than these steps.
DTYPES = {"delta": "float64", "efficient": "float64", "gpt": "float64"}
WITHIN = {"float32": 1e-5, "float64": 1e-6}


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


def new(name: str, folder: Path, steps: int, **overrides) -> dict:
    """A job that trains one of `MODELS`."""
    return {**job(folder, steps, **MODELS[name], **overrides), "dtype": dtype_of(name)}


def dtype_of(name: str) -> str:
    return DTYPES.get(name, "float32")


def assert_same(name: str, folder: Path, other: Path) -> None:
    expected, found = losses(folder), losses(other)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    within = WITHIN[dtype_of(name)]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], abs=within)


def compare(folder: Path, steps: int, size: int, names: Iterable[str]) -> None:
    for name in names:
        run_job(new(name, folder / name / "alone", steps))
    ways = [(name, kind) for name in names for kind in ("ddp", "fsdp")]
    jobs = [new(name, folder / name / kind, steps, parallel=kind) for name, kind in ways]
    train_together(size, folder, jobs)
    for name, kind in ways:
        alone, other = folder / name / "alone", folder / name / kind
        assert_same(name, alone, other)
        for a, b in zip(watched(alone), watched(other), strict=True):
            assert b == pytest.approx(a, rel=1e-3)


def test_two_processes_have_the_losses_of_one(tmp_path):
    compare(tmp_path, 6, 2, ("headline", "cells", "efficient"))


def go_through(name: str, folder: Path, steps: int, first: int, *legs: tuple[int, list]) -> Path:
    """The folder of a run that others go on with, whose losses are those of one that nobody does.

    Args:
        first: the step at which a single process stops.
        legs: each a number of processes, and ways for them with the steps at which they stop.
    """
    whole, chain = folder / "whole", folder / "chain"
    run_job(new(name, whole, steps))
    run_job({**new(name, chain, steps), "stop": first})
    for size, ways in legs:
        train_together(size, folder, [go_on(chain, *way, dtype=dtype_of(name)) for way in ways])
    run_job(go_on(chain, "auto", dtype=dtype_of(name)))
    assert_same(name, whole, chain)
    return runs.only_run(chain)


def test_a_run_goes_on_with_other_numbers_of_processes_and_another_parallel(tmp_path):
    """1 → 2 (ddp) → 2 (fsdp) → 1, with optimizer state, carry, memories and tied weights."""
    run = go_through("delta", tmp_path, 12, 2, (2, [("ddp", 5), ("fsdp", 8)]))
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_process_holds_its_share_of_the_weights(tmp_path, size):
    """And in a forward pass one block at most beside it, what is sent and received among it.

    A fifth of a block is for what passes through the model, and for libraries. A step has a share
    of the gradients and of the sums as well, and the gradients of a block.
    """
    with started(size, "-m", "tests.training.shares", "fsdp") as processes:
        for status, out, stderr in ended(processes):
            assert status == 0, stderr
            held = json.loads(out)
            share, block = held["all"] / size, held["block"]
            assert held["weights"] < share + block / 4
            assert held["forward"] < share + 1.2 * block
            assert held["step"] < 3 * share + 4 * block


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_from_one_to_two_to_four_to_one(tmp_path, name):
    twice, again = [("ddp", 18), ("fsdp", 25)], [("fsdp", 32), ("ddp", 40)]
    go_through(name, tmp_path, 50, 10, (2, twice), (4, again))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_losses_are_the_same_over_fifty_steps(tmp_path, size):
    compare(tmp_path, 50, size, MODELS)
