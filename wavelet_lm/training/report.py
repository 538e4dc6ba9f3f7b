"""What a run says while it trains: lines of metrics.jsonl and of the log, a progress bar, its end
when it diverges."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.training.memory_estimate import peak_bytes
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.saved_files import described
from wavelet_lm.training.saved_state import Progress
from wavelet_lm.training.scales import scales_of
from wavelet_lm.training.schedule import learning_rate
from wavelet_lm.training.task import Task, Validation
from wavelet_lm.training.weights import Weights

# Where there is no terminal, and so no progress bar.
SECONDS_BETWEEN_LINES = 30.0


class Diverged(UserError):
    """The loss or the weights are no longer finite, or the loss exploded."""


class Report:
    """Speaks for a run, of which it reads where it stands."""

    def __init__(
        self, config: Config, task: Task, run: RunFolder, progress: Progress, weights: Weights
    ):
        self.config, self.task, self.run, self.progress = config, task, run, progress
        self.weights = weights
        self._validated: list[str] = []
        self._said = 0.0

    @property
    def per_second(self) -> float:
        """Speed of the training alone, in the task's unit."""
        done = self.progress
        return done.step * self.task.per_step / done.seconds if done.seconds else 0.0

    def _rate(self, step: int) -> float:
        """The learning rate of the update that made this step."""
        return learning_rate(self.config, max(0, step - 1), self.progress.total_steps)

    def is_due(self, step: int) -> bool:
        """Whether the update that made this step has a line of the metrics."""
        return step % self.config.log_interval == 0 or step == 1

    def trained(self, step: int, loss: float, grad_norm: float) -> None:
        """That line, where it is due; a norm of NaN was not asked for."""
        if self.is_due(step):
            norm = grad_norm if math.isfinite(grad_norm) else None  # as of fp16 that overflowed
            self.run.write_metrics(
                event="train",
                step=step,
                loss=loss,
                lr=self._rate(step),
                **({} if math.isnan(grad_norm) else {"grad_norm": norm}),
                memory_bytes=peak_bytes(self.task.device),
                **{f"{self.task.unit}_per_second": round(self.per_second, 1)},
                seconds=round(self.progress.seconds, 3),
            )

    def validated(self, found: Validation) -> None:
        """A line of the metrics, and one for people."""
        done = self.progress
        self.run.write_metrics(event="eval", step=done.step, **found.row)
        if scales := scales_of(self.task.model, self.weights):
            self.run.write_metrics(event="scales", step=done.step, blocks=scales)
        words = [f"step {done.step:>6}/{done.total_steps}"]
        if done.smooth_loss is not None:
            words.append(f"train loss {done.smooth_loss:.4f}")
        words += found.words
        if done.step:
            words.append(f"{self.per_second:,.0f} {self.task.unit}/s")
        self.run.log(" | ".join(words))
        self._validated = found.words[:1]

    def sampled(self, found: dict[str, str]) -> None:
        """A line of the metrics with what a task has written, if it has."""
        if found:
            self.run.write_metrics(event="sample", step=self.progress.step, **found)

    def diverged(self, reason: str) -> Diverged:
        """The error that says why, what is left of the run, and what to try."""
        files = " and ".join(described(self.run))
        saved = f"the last good weights are in {files}" if files else "nothing was saved yet"
        return Diverged(
            f"training diverged: {reason} (learning rate {self._rate(self.progress.step):.3g});"
            f" {saved}; lower lr ({self.config.lr}) or raise warmup_fraction"
            f" ({self.config.warmup_fraction})"
        )

    @contextmanager
    def bar(self) -> Iterator[Any]:
        """A progress bar that `step` moves, on a terminal; elsewhere a line now and then."""
        from tqdm import tqdm

        done = self.progress
        self._said = time.monotonic()
        with tqdm(
            total=done.total_steps,
            initial=done.step,
            desc=self.run.title,
            unit="step",
            disable=None if self.task.processes.is_main else True,
            leave=False,
        ) as bar:
            yield bar

    def step(self, bar: Any) -> None:
        """Show on the bar that one more step is done, or say so where there is no terminal."""
        done = self.progress
        bar.total = done.total_steps
        bar.update(1)
        if done.smooth_loss is None:
            return
        words = [
            f"loss {done.smooth_loss:.3f}",
            f"lr {self._rate(done.step):.2g}",
            f"{self.per_second:,.0f} {self.task.unit}/s",
        ]
        if not bar.disable:
            bar.set_postfix_str(", ".join([*words, *self._validated]), refresh=False)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            seconds = round(done.seconds / done.step * (done.total_steps - done.step))
            left = f"{timedelta(seconds=seconds)} left"
            prefix = f"{self.run.title}: " if self.run.title else ""
            place = f"{prefix}step {done.step:>6}/{done.total_steps}"
            self.run.say(" | ".join([place, *words, left]))
