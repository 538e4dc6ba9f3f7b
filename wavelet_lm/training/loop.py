"""The training loop, of whatever task."""

import math
import signal
import time

import torch

from wavelet_lm.allocator import keep_freed_memory
from wavelet_lm.config import Config
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.training import saved_state
from wavelet_lm.training.device_batches import DeviceBatches
from wavelet_lm.training.float8 import use_float8
from wavelet_lm.training.late_reading import LateReading
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision, collapsed
from wavelet_lm.training.report import Report
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.saved_files import FileSaver
from wavelet_lm.training.saved_state import Progress
from wavelet_lm.training.schedule import learning_rate, warmup_steps
from wavelet_lm.training.stop_signals import StopSignals
from wavelet_lm.training.task import Task, Validation
from wavelet_lm.training.weights import Saved, Weights
from wavelet_lm.training.working_weights import WorkingWeights, copied_dtype

SMOOTHING = 0.95


class Trainer:
    """Trains the model of a task, and leaves checkpoints in the folder of the run.

    `train` runs to the last step; `save` and `restore` make the rest of a run independent of
    whether it was stopped in between.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        run: RunFolder,
        total_steps: int,
        *,
        weights: Weights | None = None,
        saver: FileSaver | None = None,
    ):
        self.config, self.task, self.run = config, task, run
        self.weights = weights or Weights(task.model)
        self.saver = saver or FileSaver(run, config.keep_checkpoints)
        self.precision = Precision(config, task.device)
        if config.amp_dtype == "fp8":
            use_float8(task.model)
        n_processes = task.processes.size
        dtype = copied_dtype(config, self.precision.dtype, n_processes)
        self.working = WorkingWeights(task.model, dtype)
        self.optimizer = Optimizer(task.model, config, self.weights, self.working.copies)
        self.batches = DeviceBatches(task.batch, task.device)
        self.progress = Progress(total_steps)
        self.report = Report(config, task, run, self.progress, self.weights)
        self._unread: tuple[int, LateReading] | None = None
        self._unknown = torch.full((), math.nan, device=task.device)
        self._signals = StopSignals()
        self._agreed_to_stop = False

    def train(self) -> None:
        """Run from where it stands to the last step, and leave `last` and `best` checkpoints.

        Raises:
            Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with everything saved.
            Diverged: the loss is NaN or exploded; nothing is saved, the last good files stay.
            UserError: the GPU's memory or the disk is full.
        """
        if self.task.device.type == "cpu":
            keep_freed_memory()
        try:
            self._train()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.task.device} ran out of memory at step {self.progress.step}; lower"
                f" micro_batch_size ({self.config.micro_batch_size}) and raise grad_accum to match"
            ) from error

    def _train(self) -> None:
        done = self.progress
        self.working.refresh()  # of what a checkpoint has brought
        with StopSignals() as stop, self.report.bar() as bar:
            self._signals = stop
            self.batches.fetch(done.step)
            while done.step < done.total_steps and not self._stops():
                self._validate_if_due()
                self._sample_if_due()
                if done.step % self.config.save_interval == 0 and done.step > 0:
                    self.save()
                started = time.perf_counter()
                self._update()
                done.step += 1
                done.seconds += time.perf_counter() - started
                self._stepped()
                self.report.step(bar)
            if not self._stops():
                self._validate_if_due()
                self._sample_if_due()
            self.save()
            self.saver.finish()
            if self._stops():
                raise Interrupted(
                    stop.received or signal.SIGTERM,
                    f"stopped and saved at step {done.step} of {done.total_steps}; go on with:"
                    f" {self.run.go_on}",
                    agreed=True,
                )

    def _stops(self) -> bool:
        """Whether a signal ends the loop here; several processes agree on it with their losses."""
        if self.task.processes.size == 1:
            return bool(self._signals.received)
        return self._agreed_to_stop

    def _update(self) -> None:
        """One optimizer step."""
        step, n = self.progress.step, self.task.n_passes
        self.optimizer.set_lr(learning_rate(self.config, step, self.progress.total_steps))
        total = torch.zeros((), device=self.task.device)
        with self.working.in_place():
            for loss in self.task.losses(step, self.batches[step]):
                self.precision.backward(loss / n)
                self.working.gather(in_float32=n > 1)
                total += loss.detach() / n
        self.batches.fetch(step + 1)  # while this one computes
        self.weights.take_gradients()
        norm = self.precision.update(self.optimizer, self.weights, self.config.grad_clip)
        self.optimizer.zero_grad()
        # The loss is read one step late, so that the host never waits for the step it has queued.
        self._read_loss()
        norm = self._unknown if norm is None else norm.to(total)
        values = torch.stack([total, self.precision.scaler.value, norm])
        processes = self.task.processes
        if processes.size > 1:
            asked = torch.full((1,), float(self._signals.received > 0), device=self.task.device)
            values = processes.total(torch.cat([values, asked])) / processes.size
        self._unread = (step + 1, LateReading(values))

    def _stepped(self) -> None:
        """Called after each step, outside of its time."""

    def _read_loss(self) -> None:
        """Read the loss that is still on its way; stop when it is not one to go on from."""
        if self._unread is None:
            return
        step, (loss, scale, norm, *asked) = self._unread[0], self._unread[1].read()
        self._unread = None
        self._agreed_to_stop |= any(asked)
        if not math.isfinite(loss):
            raise self.report.diverged(f"the loss is {loss} at step {step}")
        if loss > self.task.worst_loss:
            raise self.report.diverged(f"the loss exploded to {loss:.2f} at step {step}")
        old = loss if self.progress.smooth_loss is None else self.progress.smooth_loss
        self.progress.smooth_loss = SMOOTHING * old + (1 - SMOOTHING) * loss
        if self.report.is_due(step) and collapsed(scale):
            raise self.report.diverged(f"every fp16 gradient overflows at step {step}")
        self.report.trained(step, loss, norm)

    # --- validation and checkpoints --------------------------------------------------------------

    def validate(self) -> Validation:
        """The task's validation, with the weights as they are."""
        return self.task.validate()

    def _validate_if_due(self) -> None:
        done = self.progress
        is_last = done.step == done.total_steps
        due = is_last or done.step % self.config.eval_interval == 0
        if done.step == 0 and not self.task.validates_untrained:
            due = False
        if not due or done.evaluated_step == done.step:
            return
        self._read_loss()
        found = self.validate()
        if not math.isfinite(found.loss):
            reason = f"the validation loss is {found.loss} at step {done.step}"
            raise self.report.diverged(reason)
        done.evaluated_step = done.step
        self.report.validated(found)
        in_warmup = done.step < warmup_steps(self.config, done.total_steps)
        skip = done.step == 0 or (in_warmup and self.config.skip_warmup_saves)
        if found.loss < done.best_loss and not skip:
            self._require_finite_weights()
            done.best_loss, done.best_step = found.loss, done.step
            self._save_best()

    def _sample_if_due(self) -> None:
        step, interval = self.progress.step, self.config.sample_interval
        if interval and step and step % interval == 0:
            self._read_loss()
            self.report.sampled(self.task.sample(self.run, self.weights, step))

    def _save_best(self) -> None:
        """Write the weights of now to `best.safetensors`, as those of the best step."""
        metadata = {"step": self.progress.best_step, "val_loss": self.progress.best_loss}
        whole = self.weights.gathered()
        if self.task.processes.is_main:
            save_checkpoint(self.run.best, self.task.model, metadata, weights=whole)

    def save(self) -> None:
        """Write weights, optimizer, generators, and where the run stands, to go on from."""
        self._read_loss()
        self._require_finite_weights()
        task = self.task
        state = saved_state.collect(
            self.progress, task, self.optimizer, self.precision, self.weights
        )
        self.saver.save(task.model, self.weights, *state)

    def _require_finite_weights(self) -> None:
        if not self.weights.are_finite():
            raise self.report.diverged(f"the weights are not finite at step {self.progress.step}")

    def restore(self, checkpoint: Saved, changed: bool = False) -> None:
        """The inverse of `save`.

        Args:
            changed: whether the run goes on otherwise than it would have from this checkpoint.

        Raises:
            UserError: the checkpoint or the data are not those of this run.
        """
        task = self.task
        task.check_data(checkpoint)
        self.progress.restore(checkpoint.metadata)
        revalidate = task.validates_otherwise(checkpoint)
        has_best = self.progress.best_step >= 0 or self.run.best.is_file()
        if (changed or revalidate) and has_best:
            self._restore_best(revalidate)
        self.weights.load(checkpoint)
        tensors = saved_state.put_back(
            checkpoint, task, self.optimizer, self.precision, self.weights
        )
        task.restore(checkpoint, tensors, self.run.log)

    def _restore_best(self, revalidate: bool) -> None:
        """Take the best checkpoint for the one to beat, with its loss on today's windows.

        It may be of a later step than the last checkpoint, which is now not trained again as it
        was. It is written anew, for it says where the data lie.
        """
        done, best = self.progress, Checkpoint(self.run.best)
        self.weights.load(best)
        done.best_step, done.best_loss = best.metadata["step"], best.metadata["val_loss"]
        if revalidate:
            before, done.best_loss = done.best_loss, self.validate().loss
            self.run.log(
                f"validation reads other windows than before: {self.run.best.name} of step"
                f" {done.best_step} has loss {done.best_loss:.4f} on them (had {before:.4f})"
            )
        self._save_best()
