"""The task of a language model: the next token of windows of a text."""

import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

from wavelet_lm.config import Config
from wavelet_lm.data.batches import (
    batch_size,
    own_validation_batches,
    steps_per_epoch,
    training_batches,
)
from wavelet_lm.data.dataset import TokenizedText
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.training.device_batches import to_device
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.samples import TOKENS_ON_THE_WAY, keep, sample
from wavelet_lm.training.task import MicroBatch, Task, Validation
from wavelet_lm.training.weights import Weights

# A loss this many times that of guessing uniformly has left the region from which it recovers.
EXPLODED = 4.0
# What begins the names of the tensors that windows hand on.
CARRY = "carry"


def total_steps(config: Config, data: TokenizedText) -> int:
    """Optimizer steps of the run: `max_steps`, or `epochs` times the steps of one."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(config.epochs * steps_per_epoch(config, len(data.train.tokens))))


def _by_name(window: Any) -> dict[str, Tensor]:
    leaves, _ = tree_flatten_with_path(window)
    return {_leaf_name(place): rows for place, rows in leaves if rows is not None}


def _leaf_name(place: tuple[Any, ...]) -> str:
    """That of a tensor in a checkpoint; a mean that is all there is has always been `carry`."""
    name = keystr(place)
    return CARRY if name == ".mean" else CARRY + name


def _together(*parts: Tensor | None) -> Tensor | None:
    """The rows of all of them [n, ...], or None where a state has nothing there."""
    return None if parts[0] is None else torch.cat(parts)


class LanguageModelling(Task):
    """Mean nats per token; what a window hands on is carried to the next one of the same text.

    Attributes:
        loss_function: `model.loss`, or what computes the same.
        window: what the next windows start with, tensors [windows, ...] in whatever the model hands
            on; None = nothing.
    """

    unit = "tokens"

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        data: TokenizedText,
        device: torch.device,
        processes: Processes = ALONE,
    ):
        super().__init__(config, model, device, processes)
        self.data = data
        self._own = processes.own(batch_size(config))
        self._n_windows = self._own.stop - self._own.start
        self.per_step = batch_size(config) * config.block_size
        self.worst_loss = EXPLODED * math.log(max(2, model.vocab_size))
        self.windows = training_batches(config, data.train.tokens, self._own)
        self.validation, self._n_validated = own_validation_batches(
            config, data.valid.tokens, processes.rank, processes.size
        )
        self.loss_function: Callable[..., tuple[Tensor, Any]] = model.loss
        self.window: Any = None

    def batch(self, step: int) -> list[MicroBatch]:
        """Tokens and next tokens, int64 [micro_batch_size, block_size] each, or fewer windows."""
        parts = (tokens.chunk(self.n_passes) for tokens in self.windows[step])
        return list(zip(*parts, strict=True))

    def losses(self, step: int, batch: list[MicroBatch]) -> Iterator[Tensor]:
        starts = self._starts(step)
        for i, (inputs, targets) in enumerate(batch):
            with self.autocast():
                loss, state = self.loss_function(inputs, targets, starts[i])
            starts[i] = self.model.next_window(state)
            yield loss
        if starts[0] is not None:
            self.window = tree_map(_together, *starts)

    def _starts(self, step: int) -> list[Any]:
        """For each micro-batch the state that its windows start with, None for nothing.

        It is what the windows before them handed on, or that of a new text where one starts.
        """
        window = self.window
        if window is None or self.windows.starts_text(step):
            window = self.model.first_window(self._n_windows, self.device)
        if window is None:
            return [None] * self.n_passes
        n = self.n_passes
        return [tree_map_only(Tensor, lambda rows, i=i: rows.chunk(n)[i], window) for i in range(n)]

    @torch.no_grad()
    def validate(self) -> Validation:
        """Mean loss in nats per token over the fixed validation windows."""
        self.model.eval()
        total, n = torch.zeros((), dtype=torch.float64, device=self.device), 0
        left = self._n_validated
        for window in self.validation:
            inputs, targets = (to_device(tokens, self.device) for tokens in window)
            with self.autocast():
                losses = self.model.token_losses(inputs, targets)
            losses = losses[:left]
            total += losses.sum(dtype=torch.float64)  # read once, after the last one
            n, left = n + losses.numel(), left - len(losses)
        self.model.train()
        if self.processes.size > 1:
            total, n = self.processes.total(torch.stack([total, total.new_tensor(n)])).tolist()
        loss, valid = float(total) / n, self.data.valid
        words, bits_per_byte = [f"valid loss {loss:.4f}"], None
        if valid.n_bytes:  # what is no text has none
            bits_per_byte = loss / math.log(2) * len(valid.tokens) / valid.n_bytes
            words.append(f"{bits_per_byte:.4f} bits/byte")
        return Validation(loss, {"val_loss": loss, "bits_per_byte": bits_per_byte}, words)

    def sample(self, run: RunFolder, weights: Weights, step: int) -> dict[str, str]:
        whole = weights.gathered()
        if not self.processes.is_main:
            return {}
        config, tokenizer, device = self.config, self.data.tokenizer, self.device
        generators = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(generators):
                # A model of its own, of the same weights: what is trained is not touched.
                model = StoredModel(config, tokenizer.vocab_size, whole.__getitem__, device)
                found = sample(model, tokenizer, config, TOKENS_ON_THE_WAY)
        except (UserError, torch.OutOfMemoryError) as error:
            run.log(f"no sample: {str(error).splitlines()[0]}")
            return {}
        if found.completion.reason == "interrupted":  # by a signal that the loop is to hear of
            signal.raise_signal(signal.SIGINT)
            return {}
        keep(run, tokenizer, found, f"samples/step_{step:08}")
        return {"prompt": found.prompt, "text": found.completion.text}

    # --- what a resumed run needs -----------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        return {
            "eval_windows": self._eval_windows,
            "train_tokens": len(self.data.train.tokens),
            "data": self.data.keys,
        }

    def saved_tensors(self) -> dict[str, Tensor]:
        leaves = {} if self.window is None else _by_name(self.window)
        return {name: self.processes.joined(rows) for name, rows in leaves.items()}

    def check_data(self, checkpoint: Checkpoint) -> None:
        checkpoint.require({"train_tokens": (int,)})
        saved, data, dataset = checkpoint.metadata, self.data, self.config.dataset
        n, advice = len(data.train.tokens), "put the old text back, or start a new run from this"
        advice += f" one with --init_from {checkpoint.path.parent}"
        if saved["train_tokens"] != n:
            raise UserError(
                f"{checkpoint.path}: trained on {saved['train_tokens']} tokens but {dataset} now"
                f" has {n}: the data changed; {advice}"
            )
        # A checkpoint of before the keys were kept has none to compare.
        for split, key in saved.get("data", data.keys).items():
            if key != data.keys[split]:
                raise UserError(
                    f"{checkpoint.path}: the data changed: the {split} split of {dataset} is not"
                    f" the one that this run began with; {advice}"
                )

    @torch.no_grad()
    def _some_window(self) -> Any:
        """What a window of one token hands on, for its structure; no random number is drawn."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return self.model.next_window(self.model.loss(token, token)[1])

    @property
    def _eval_windows(self) -> int:
        return self.config.eval_batches * batch_size(self.config)

    def validates_otherwise(self, checkpoint: Checkpoint) -> bool:
        then = checkpoint.config
        # Before this was kept, a batch of validation was a micro-batch.
        windows = then.eval_batches * then.micro_batch_size
        return checkpoint.metadata.get("eval_windows", windows) != self._eval_windows

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], log: Callable[[str], None]
    ) -> None:
        saved = {name: rows for name, rows in tensors.items() if name.startswith(CARRY)}
        # One of another size is of before the streams were those of the whole batch.
        if saved and all(len(rows) == batch_size(self.config) for rows in saved.values()):
            own = {name: rows[self._own].to(self.device) for name, rows in saved.items()}
            leaves, structure = tree_flatten_with_path(self._some_window())
            names = [_leaf_name(place) for place, _ in leaves]
            self.window = tree_unflatten([own.get(name) for name in names], structure)
        if self.config.grad_accum > 1 and "eval_windows" not in checkpoint.metadata:
            log(
                f"the steps up to {checkpoint.metadata['step']} drew their windows by micro-batch,"
                " as was done then; from here on they are those of the whole batch"
            )
