"""Models trained on the same batches, and what each needs to reach the loss of the first.

Every run is one of the `Trainer`; a seed decides the order of the batches, so the runs of a seed
read the same ones. A budget in seconds counts training alone, without validation and without what
the first step sets up. FLOPs are those of `models/cost.py`: matrix products, forward and
backward, without the Hadamard transforms.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.data.batches import batch_size
from wavelet_lm.data.dataset import TokenizedText
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.sweep import forget_the_last_run
from wavelet_lm.models.cost import breakdown
from wavelet_lm.models.registry import build_model, model_without_weights, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.language import LanguageModelling, total_steps
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import refuse_what_cannot_train
from wavelet_lm.training.report import Diverged
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.task import Task
from wavelet_lm.training.tracking import refuse_watching

AXES = ("step", "epoch", "seconds", "flops")

Row = dict[str, Any]


# --- how long ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long every run trains: `amount` of `kind`, which is steps, seconds or flops."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `steps:2000`, `seconds:600` or `flops:1e13`.

        Raises:
            UserError: the text is none of these.
        """
        kind, _, number = text.partition(":")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        whole = kind != "steps" or amount.is_integer()
        if kind not in ("steps", "seconds", "flops") or not 0 < amount < math.inf or not whole:
            raise UserError(
                f"budget is {text!r}; it must be steps:N, seconds:N or flops:N with N above 0, such"
                " as steps:2000 or flops:1e13"
            )
        return cls(kind, amount)

    def steps(self, flops_per_step: int) -> int | None:
        """The number of optimizer steps that fit; None where only the clock knows.

        Raises:
            UserError: not a single step fits.
        """
        if self.kind == "seconds":
            return None
        steps = int(self.amount) if self.kind == "steps" else int(self.amount // flops_per_step)
        if steps < 1:
            raise UserError(
                f"a budget of {self.amount:g} FLOPs is less than one step of {flops_per_step:.3g};"
                " give more, or lower micro_batch_size"
            )
        return steps


class ComparedTrainer(Trainer):
    """A trainer that keeps the time of every step and may end by the clock.

    Args:
        steps: to take; None = as many as fit into `seconds`. The learning rate then follows the
            clock: the number of steps is estimated anew after each one.

    Attributes:
        clock: seconds of training after each step.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        run: RunFolder,
        steps: int | None,
        seconds: float = math.inf,
    ):
        super().__init__(config, task, run, steps or 1)
        self.clock: list[float] = []
        self._seconds = None if steps else seconds

    def _train(self) -> None:
        self._warm_up()
        super()._train()

    def _warm_up(self) -> None:
        """Compile and allocate outside of the clock; nothing of the run is changed by it."""
        device = self.task.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(2):
                started = time.perf_counter()
                for loss in self.task.losses(0, self.batches[0]):
                    loss.backward()
                float(loss.detach())
                seconds = time.perf_counter() - started
        self.optimizer.zero_grad()
        if self._seconds:
            self.progress.total_steps = max(1, int(self._seconds / seconds))

    def _stepped(self) -> None:
        done = self.progress
        self.clock.append(done.seconds)
        if self._seconds:
            fitting = int(self._seconds * done.step / done.seconds)
            is_over = done.seconds >= self._seconds
            done.total_steps = done.step if is_over else max(done.step + 1, fitting)


# --- training ------------------------------------------------------------------------------------


def check(configs: Mapping[str, Config], vocab_size: int) -> dict[str, Row]:
    """What each model costs, by name: n_params, flops_per_token and hadamard_flops_per_token.

    Raises:
        UserError: a model cannot be built, or not be trained on this machine.
    """
    costs = {}
    for name, config in configs.items():
        refuse_watching(name, config)
        try:
            model = model_without_weights(config, vocab_size)
            refuse_what_cannot_train(model, resolve_device(config.device))
            counted = breakdown(config, vocab_size)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        costs[name] = {
            "n_params": counted.n_params,
            "flops_per_token": counted.total.flops,
            "hadamard_flops_per_token": counted.hadamard_flops,
        }
    return costs


def compare(
    configs: Mapping[str, Config],
    data: TokenizedText,
    budget: Budget | None,
    lrs: Sequence[float],
    seeds: Sequence[int],
    *,
    finished: Callable[[Row], None] = lambda run: None,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Train every model at every learning rate with every seed, the seeds one after the other.

    Args:
        configs: by the names of the models; those of `data` and training are the same for all.
        budget: of each run; None = as the config says.
        finished: called after each run with its row.

    Returns:
        The rows of the runs, for `summary`.

    Raises:
        UserError: a config that is not allowed, before anything is trained; later what the
            `Trainer` raises, but a run that diverges is only a row that says so.
        Interrupted: Ctrl-C or SIGTERM; the run that it stops is lost.
    """
    members = [
        (name, config.replace(lr=lr, seed=seed, log_interval=1))
        for seed in seeds
        for name, config in configs.items()
        for lr in lrs
    ]
    costs = check(configs, data.tokenizer.vocab_size)
    for name, config in configs.items():
        if budget is not None:
            budget.steps(costs[name]["flops_per_token"] * tokens_per_step(config))
        flops = costs[name]["flops_per_token"]
        log(f"{name}: {costs[name]['n_params']:,} parameters, {flops:,} FLOPs per token")
    runs: list[Row] = []
    for i, (name, config) in enumerate(members):
        log(f"\n{name}, lr {config.lr:g}, seed {config.seed}: run {i + 1} of {len(members)}")
        about = {"model": name, "lr": config.lr, "seed": config.seed}
        forget_the_last_run()
        try:
            runs.append({**about, **train_one(config, data, budget, costs[name])})
        except Diverged as error:
            # What follows tells where weights are kept, and here none are.
            runs.append({**about, "diverged": str(error).split(";")[0]})
            log(runs[-1]["diverged"])
        finished(runs[-1])
    return runs


def train_one(config: Config, data: TokenizedText, budget: Budget | None, costs: Row) -> Row:
    """Train one model in a temporary run folder; its figures and its curve."""
    use_threads(config.threads)
    device = resolve_device(config.device)
    flops_per_step = costs["flops_per_token"] * tokens_per_step(config)
    steps = total_steps(config, data) if budget is None else budget.steps(flops_per_step)
    torch.manual_seed(config.seed)
    with device:
        model = build_model(config, data.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(config.replace(out_dir=folder), data.name)
        seconds = math.inf if budget is None else budget.amount
        task = LanguageModelling(config, model, data, device)
        task.loss_function = compiled(model, config, device, run.log)
        trainer = ComparedTrainer(config, task, run, steps, seconds)
        trainer.train()
        metrics = run.metrics()
    step_seconds = statistics.median(b - a for a, b in pairwise([0.0, *trainer.clock]))
    tokens_per_epoch = len(data.train.tokens)
    curve = curve_of(metrics, trainer.clock)
    for point in curve:
        point["epoch"] = round(point["step"] * tokens_per_step(config) / tokens_per_epoch, 5)
        point["flops"] = point["step"] * flops_per_step
    return {
        "n_params": n_params(model),
        **costs,
        "steps": trainer.progress.step,
        "seconds": round(trainer.progress.seconds, 3),
        "flops": trainer.progress.step * flops_per_step,
        "step_milliseconds": round(1000 * step_seconds, 3),
        "tokens_per_second": round(tokens_per_step(config) / step_seconds, 1),
        **{key: curve[-1][key] for key in ("train_loss", "valid_loss")},
        "curve": curve,
        "config": config.to_dict(),
    }


def tokens_per_step(config: Config) -> int:
    """Positions that an optimizer step learns from."""
    return batch_size(config) * config.block_size


def curve_of(metrics: Sequence[Row], clock: Sequence[float]) -> list[Row]:
    """A point per validation: step, seconds, valid_loss, and train_loss since the point before."""
    losses = {row["step"]: row["loss"] for row in metrics if row["event"] == "train"}
    curve: list[Row] = []
    for row in metrics:
        if row["event"] != "eval":
            continue
        step, before = row["step"], curve[-1]["step"] if curve else 0
        since = [losses[s] for s in range(before + 1, step + 1)]
        curve.append(
            {
                "step": step,
                "seconds": round(clock[step - 1], 3) if step else 0.0,
                "train_loss": round(statistics.fmean(since), 5) if since else None,
                "valid_loss": round(row["val_loss"], 5),
            }
        )
    return curve


# --- comparing -----------------------------------------------------------------------------------


def reached(curve: Sequence[Row], target: float) -> dict[str, float] | None:
    """Where the validation loss first is `target` or less, on every axis; None if it never is.

    Between two validations the loss is taken for a straight line.
    """
    before = None
    for point in curve:
        if point["valid_loss"] <= target:
            if before is None:
                return {axis: float(point[axis]) for axis in AXES}
            fall = before["valid_loss"] - point["valid_loss"]
            part = (before["valid_loss"] - target) / fall
            return {axis: before[axis] + part * (point[axis] - before[axis]) for axis in AXES}
        before = point
    return None


def summary(runs: Sequence[Row]) -> list[Row]:
    """A row per model: its best learning rate, and where it reaches the first model's final loss.

    The best rate has the lowest final validation loss, on average over the seeds; one that diverged
    with any seed, or was tried with fewer of them, is not it. Figures are means over the seeds.
    `parity` compares runs of a seed with one another, and is None where one does not reach the
    loss, or the first model has none; `relative_step_time` is the ratio of the median step times.
    """
    names = list(dict.fromkeys(run["model"] for run in runs))
    chosen = {name: best([run for run in runs if run["model"] == name]) for name in names}
    first = {run["seed"]: run for run in chosen[names[0]]} if names else {}
    return [_row(name, chosen[name], first, runs) for name in names]


def best(runs: Sequence[Row]) -> list[Row]:
    """The runs of one model at its best learning rate, one of each seed; empty if all diverged."""
    by_lr: dict[float, list[Row]] = {}
    for run in runs:
        by_lr.setdefault(run["lr"], []).append(run)
    n_seeds = max(map(len, by_lr.values()), default=0)
    whole = [
        group
        for group in by_lr.values()
        if len(group) == n_seeds and not any("diverged" in run for run in group)
    ]
    return min(whole, key=lambda group: _mean(group, "valid_loss"), default=[])


def _row(name: str, chosen: list[Row], first: Mapping[int, Row], runs: Sequence[Row]) -> Row:
    own = [run for run in runs if run["model"] == name]
    row: Row = {"model": name, "n_runs": len(own)}
    if not chosen:
        return {**row, "diverged": own[0].get("diverged", "diverged")}
    pairs = [(run, first[run["seed"]]) for run in chosen if run["seed"] in first]
    points = [reached(run["curve"], other["valid_loss"]) for run, other in pairs]
    parity = None
    if points and all(points):
        parity = {axis: statistics.fmean(point[axis] for point in points) for axis in AXES}
    ratios = [run["step_milliseconds"] / other["step_milliseconds"] for run, other in pairs]
    keys = ("steps", "seconds", "flops", "tokens_per_second", "train_loss", "valid_loss")
    return {
        **row,
        "lr": chosen[0]["lr"],
        "seeds": [run["seed"] for run in chosen],
        **{key: chosen[0][key] for key in ("n_params", "flops_per_token")},
        **{key: _mean(chosen, key) for key in keys},
        "valid_losses": [run["valid_loss"] for run in chosen],
        "best_valid_loss": statistics.fmean(
            min(point["valid_loss"] for point in run["curve"]) for run in chosen
        ),
        "relative_step_time": statistics.fmean(ratios) if ratios else None,
        "parity": parity,
    }


def _mean(runs: Sequence[Row], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)
