"""The training loop of one run.

One room: all that changes while a model is trained, what is saved of it, and how it is restored.
"""

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import Config
from wavelet_lm.data.batches import batch_size, training_batches, validation_batches
from wavelet_lm.data.dataset import TokenizedText
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.models.wavelet_lm.model import Carry
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.schedule import learning_rate, warmup_steps

# A loss this many times that of guessing uniformly has left the region from which it recovers.
EXPLODED = 4.0
SMOOTHING = 0.95
# What `save` has written since the first version, and of which type.
SAVED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "total_steps", "evaluated_step", "best_step", "train_tokens"), (int,)),
    **dict.fromkeys(("best_loss", "smooth_loss"), (float, int, type(None))),
    "seconds": (float, int),
    **dict.fromkeys(("scaler", "optimizer"), (dict,)),
}


class Diverged(UserError):
    """The loss or the weights are no longer finite, or the loss exploded."""


class Trainer:
    """Everything that changes while a model is trained, and the loop that changes it.

    `train` runs to the last step; `save` and `restore` make the rest of a run independent of
    whether it was stopped in between.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        data: TokenizedText,
        run: RunFolder,
        device: torch.device,
        total_steps: int,
    ):
        self.config, self.model, self.data, self.run = config, model, data, run
        self.device, self.total_steps = device, total_steps
        self.precision = Precision(config, device)
        self.optimizer = Optimizer(model, config)
        self.batches = training_batches(config, data.train.tokens)
        self.validation = validation_batches(config, data.valid.tokens)
        self.loss_function: Callable[..., tuple[Tensor, Any]] = model.loss
        self.step = 0
        self.evaluated_step = -1
        self.best_loss, self.best_step = math.inf, -1
        self.seconds = 0.0
        self.window: Carry | None = None  # what the next window of the same text starts with
        self.smooth_loss: float | None = None
        self._unread: tuple[int, Tensor] | None = None
        self._stop_signal = 0

    # --- the loop --------------------------------------------------------------------------------

    def train(self) -> None:
        """Run from `step` to `total_steps`, then leave `last` and `best` checkpoints behind.

        Raises:
            Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with everything saved.
            Diverged: the loss is NaN or exploded; nothing is saved, the last good files stay.
            UserError: the GPU's memory or the disk is full.
        """
        try:
            self._train()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.device} ran out of memory at step {self.step}; lower micro_batch_size"
                f" ({self.config.micro_batch_size}) and raise grad_accum to match"
            ) from error

    def _train(self) -> None:
        with self._signals(), self._progress() as bar:
            batch = self._load(self.step)
            while self.step < self.total_steps and not self._stop_signal:
                self._evaluate_if_due()
                if self.step % self.config.save_interval == 0 and self.step > 0:
                    self.save()
                started = time.perf_counter()
                batch = self._update(batch)
                self.step += 1
                self.seconds += time.perf_counter() - started
                self._report(bar)
            if not self._stop_signal:
                self._evaluate_if_due(last=True)
            self.save()
            if self._stop_signal:
                raise Interrupted(
                    self._stop_signal,
                    f"stopped and saved at step {self.step} of {self.total_steps}; go on with:"
                    f" python train.py --resume {shlex.quote(str(self.run.path))}",
                )

    def _update(self, batch: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """One optimizer step; returns the next step's batch, copied while this one computes."""
        lr = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.set_lr(lr)
        total = torch.zeros((), device=self.device)
        starts = self._starts(self.step)
        for i, (inputs, targets) in enumerate(batch):
            with self.precision.autocast():
                loss, state = self.loss_function(inputs, targets, starts[i])
            starts[i] = self.model.next_window(state)
            self.precision.backward(loss / self.config.grad_accum)
            total += loss.detach() / self.config.grad_accum
        if starts[0] is not None:
            self.window = Carry(torch.cat([start.mean for start in starts]))
        next_batch = self._load(self.step + 1)
        self.precision.update(self.optimizer, self.model, self.config.grad_clip)
        self.optimizer.zero_grad()
        # The loss is read one step late, so that the host never waits for the step it has queued.
        self._read_loss()
        self._unread = (self.step + 1, total)
        return next_batch

    def _load(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, on their way to the device."""
        parts = (tokens.split(self.config.micro_batch_size) for tokens in self.batches[step])
        return [
            (self._to_device(inputs), self._to_device(targets))
            for inputs, targets in zip(*parts, strict=True)
        ]

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.to(self.device)

    def _starts(self, step: int) -> list[Any]:
        """For each micro-batch the state that its windows start with, None for nothing.

        It is what the windows before them handed on, or that of a new text where one starts.
        """
        window = self.window
        if window is None or self.batches.starts_text(step):
            window = self.model.first_window(batch_size(self.config), self.device)
        if window is None:
            return [None] * self.config.grad_accum
        return [Carry(mean) for mean in window.mean.split(self.config.micro_batch_size)]

    # --- watching --------------------------------------------------------------------------------

    def _read_loss(self) -> None:
        """Read the loss that is still on the device; stop when it is not one to go on from."""
        if self._unread is None:
            return
        step, loss = self._unread[0], float(self._unread[1])
        self._unread = None
        limit = EXPLODED * math.log(max(2, self.model.vocab_size))
        if not math.isfinite(loss) or loss > limit:
            reason = f"is {loss}" if not math.isfinite(loss) else f"exploded to {loss:.2f}"
            raise Diverged(self._diverged(f"the loss {reason} at step {step}"))
        old = loss if self.smooth_loss is None else self.smooth_loss
        self.smooth_loss = SMOOTHING * old + (1 - SMOOTHING) * loss
        if step % self.config.log_interval == 0 or step == 1:
            if self.precision.collapsed:
                raise Diverged(self._diverged(f"every fp16 gradient overflows at step {step}"))
            self.run.write_metrics(
                event="train",
                step=step,
                loss=loss,
                lr=learning_rate(self.config, step - 1, self.total_steps),
                tokens_per_second=round(self.tokens_per_second, 1),
                seconds=round(self.seconds, 3),
            )

    def _diverged(self, reason: str) -> str:
        kept = [f for f in (self.run.last, self.run.best) if f.is_file()]
        files = " and ".join(f"{f} (step {Checkpoint(f).metadata['step']})" for f in kept)
        saved = f"the last good weights are in {files}" if files else "nothing was saved yet"
        lr = learning_rate(self.config, max(0, self.step - 1), self.total_steps)
        return (
            f"training diverged: {reason} (learning rate {lr:.3g}); {saved}; lower lr"
            f" ({self.config.lr}) or raise warmup_fraction ({self.config.warmup_fraction})"
        )

    @property
    def tokens_per_second(self) -> float:
        tokens = batch_size(self.config) * self.config.block_size
        return self.step * tokens / self.seconds if self.seconds else 0.0

    def _report(self, bar: Any) -> None:
        bar.update(1)
        if self.smooth_loss is not None:
            lr = learning_rate(self.config, self.step - 1, self.total_steps)
            bar.set_postfix_str(
                f"loss {self.smooth_loss:.3f}, lr {lr:.2g}, {self.tokens_per_second:,.0f} tok/s",
                refresh=False,
            )

    @contextmanager
    def _progress(self) -> Iterator[Any]:
        from tqdm import tqdm

        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", disable=None, leave=False
        ) as bar:
            yield bar

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGHUP end the loop after its step; a second one at once.

        A terminal that closes hangs up, unless `nohup` has had that ignored.
        """

        def stop(signum: int, frame: Any) -> None:
            if self._stop_signal:
                raise Interrupted(signum, "stopped at once, without saving")
            self._stop_signal = signum

        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals = (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))
        previous = {s: signal.signal(s, stop) for s in signals}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    # --- validation and checkpoints --------------------------------------------------------------

    def _evaluate_if_due(self, last: bool = False) -> None:
        due = last or self.step % self.config.eval_interval == 0
        if not due or self.evaluated_step == self.step:
            return
        self._read_loss()
        loss = self.validate()
        if not math.isfinite(loss):
            raise Diverged(self._diverged(f"the validation loss is {loss} at step {self.step}"))
        self.evaluated_step = self.step
        valid = self.data.valid
        bits_per_byte = None  # of tokens that are no text
        if valid.n_bytes:
            bits_per_byte = loss / math.log(2) * len(valid.tokens) / valid.n_bytes
        self.run.write_metrics(
            event="eval", step=self.step, val_loss=loss, bits_per_byte=bits_per_byte
        )
        words = [f"step {self.step:>6}/{self.total_steps}"]
        if self.smooth_loss is not None:
            words.append(f"train loss {self.smooth_loss:.4f}")
        words.append(f"valid loss {loss:.4f}")
        if bits_per_byte is not None:
            words.append(f"{bits_per_byte:.4f} bits/byte")
        if self.step:
            words.append(f"{self.tokens_per_second:,.0f} tokens/s")
        self.run.log(" | ".join(words))
        in_warmup = self.step < warmup_steps(self.config, self.total_steps)
        skip = self.step == 0 or (in_warmup and self.config.skip_warmup_saves)
        if loss < self.best_loss and not skip:
            self._require_finite_weights()
            self.best_loss, self.best_step = loss, self.step
            save_checkpoint(self.run.best, self.model, {"step": self.step, "val_loss": loss})

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats per token over the fixed validation windows, dropout off."""
        self.model.eval()
        total, n = 0.0, 0
        for inputs, targets in self.validation:
            with self.precision.autocast():
                losses = self.model.token_losses(self._to_device(inputs), self._to_device(targets))
            total += float(losses.sum(dtype=torch.float64))
            n += targets.numel()
        self.model.train()
        return total / n

    def save(self) -> None:
        """Write `last.safetensors`: weights, optimizer, generators, and where the run stands."""
        self._read_loss()
        self._require_finite_weights()
        tensors, scalars = self.optimizer.state()
        extra = {f"optimizer/{name}": t for name, t in tensors.items()}
        extra["generator/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            extra["generator/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.window is not None:
            extra["carry"] = self.window.mean
        metadata = {
            "step": self.step,
            "total_steps": self.total_steps,
            "evaluated_step": self.evaluated_step,
            "best_loss": self.best_loss if self.best_step >= 0 else None,
            "best_step": self.best_step,
            "smooth_loss": self.smooth_loss,
            "seconds": self.seconds,
            "eval_windows": self.config.eval_batches * batch_size(self.config),
            "train_tokens": len(self.data.train.tokens),
            "data": self.data.keys,
            "scaler": self.precision.scaler.state_dict(),
            "optimizer": scalars,
        }
        save_checkpoint(self.run.last, self.model, metadata, extra)

    def _require_finite_weights(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise Diverged(self._diverged(f"the weights are not finite at step {self.step}"))

    def restore(self, checkpoint: Checkpoint, changed: bool = False) -> None:
        """The inverse of `save`.

        Args:
            changed: whether the run goes on otherwise than it would have from this checkpoint.

        Raises:
            UserError: the checkpoint or the data are not those of this run.
        """
        saved = checkpoint.metadata
        self._refuse_other_data(checkpoint)
        self.best_step = saved["best_step"]
        self.best_loss = math.inf if saved["best_loss"] is None else saved["best_loss"]
        then = checkpoint.config
        # Before this was kept, a batch of validation was a micro-batch.
        windows = saved.get("eval_windows", then.eval_batches * then.micro_batch_size)
        revalidate = windows != self.config.eval_batches * batch_size(self.config)
        if (changed or revalidate) and (self.best_step >= 0 or self.run.best.is_file()):
            self._restore_best(revalidate)
        checkpoint.load_into(self.model)
        extra = checkpoint.extra()
        optimizer = {
            name.removeprefix("optimizer/"): t
            for name, t in extra.items()
            if name.startswith("optimizer/")
        }
        try:
            self.optimizer.load_state(optimizer, saved["optimizer"])
            torch.set_rng_state(extra["generator/cpu"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            problem = str(error).strip().split("\n")[0]
            raise checkpoint.damaged(f"its optimizer or generators do not fit: {problem}") from None
        if "generator/cuda" in extra and self.device.type == "cuda":
            torch.cuda.set_rng_state(extra["generator/cuda"], self.device)
        # One of another size is of before the streams were those of the whole batch.
        if "carry" in extra and len(extra["carry"]) == batch_size(self.config):
            self.window = Carry(extra["carry"].to(self.device))
        if saved["scaler"]:  # one that had nothing to scale, as on another device, has no state
            self.precision.scaler.load_state_dict(saved["scaler"])
        if self.config.grad_accum > 1 and "eval_windows" not in saved:
            self.run.log(
                f"the steps up to {saved['step']} drew their windows by micro-batch, as was done"
                " then; from here on they are those of the whole batch"
            )
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.smooth_loss, self.seconds = saved["smooth_loss"], saved["seconds"]

    def _refuse_other_data(self, checkpoint: Checkpoint) -> None:
        saved, data = checkpoint.metadata, self.data
        advice = (
            "put the old text back, or start a new run from this one with --init_from"
            f" {self.run.path}"
        )
        if saved["train_tokens"] != len(data.train.tokens):
            raise UserError(
                f"{checkpoint.path}: trained on {saved['train_tokens']} tokens but"
                f" {self.config.dataset} now has {len(data.train.tokens)}: the data changed;"
                f" {advice}"
            )
        # A checkpoint of before the keys were kept has none to compare.
        for split, key in saved.get("data", data.keys).items():
            if key != data.keys[split]:
                raise UserError(
                    f"{checkpoint.path}: the data changed: the {split} split of"
                    f" {self.config.dataset} is not the one that this run began with; {advice}"
                )

    def _restore_best(self, revalidate: bool) -> None:
        """Take the best checkpoint for the one to beat, with its loss on today's windows.

        It may be of a later step than the last checkpoint, which is now not trained again as it
        was. It is written anew, for it says where the data lie.
        """
        best = Checkpoint(self.run.best)
        best.load_into(self.model)
        self.best_step, self.best_loss = best.metadata["step"], best.metadata["val_loss"]
        if revalidate:
            before, self.best_loss = self.best_loss, self.validate()
            self.run.log(
                f"validation reads other windows than before: {self.run.best.name} of step"
                f" {self.best_step} has loss {self.best_loss:.4f} on them (had {before:.4f})"
            )
        metadata = {"step": self.best_step, "val_loss": self.best_loss}
        save_checkpoint(self.run.best, self.model, metadata)
