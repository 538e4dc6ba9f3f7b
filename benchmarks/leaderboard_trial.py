"""One run of the leaderboard: a model trained for a budget of time or FLOPs, and its figures.

Or for so many steps of multi-query recall, and what it then recalls.

The clock runs while a step is computed and stands still while anything is measured. On a CPU it is
that of the process, with one thread, so that whatever else the machine does costs a run nothing
but caches; on a GPU it is the wall's, and each step is waited for.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from leaderboard_models import body_params, build_row, check_size
from products import flops_per_token, matrix_rate
from report import Clock, resident_bytes
from torch import Tensor, nn

from wavelet_lm.allocator import keep_freed_memory
from wavelet_lm.config import Config
from wavelet_lm.data.batches import RandomCrops, validation_batches
from wavelet_lm.data.dataset import TokenizedText, TokenSplit
from wavelet_lm.data.tasks.needle import SHORTEST, find_needles
from wavelet_lm.data.tasks.recall import MultiQueryRecall
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.evaluation.likelihood import score
from wavelet_lm.evaluation.needle import NEEDLES, evaluate
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.registry import n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.memory_estimate import peak_bytes, reset_peak
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.recall import Recall
from wavelet_lm.training.weights import Weights

# Validations of a run: parts of its budget, evenly spaced on a logarithmic axis.
N_POINTS = 12
FIRST_POINT = 1 / 64
WARM_UP_STEPS = 2  # outside of the clock: compiling, allocating
STREAM_CHUNK = 1024
EVALUATED_POSITIONS = 4096  # of a forward pass of a validation
DECODED_TOKENS = 48
RECALL_EXAMPLES = 320


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs of a file of results."""

    dataset: str
    tokenizer: str
    context: int
    split: tuple[float, ...]
    cache_dir: str
    device: str
    compile: bool
    weight_decay: float
    warmup: float
    final_lr: float  # as a part of the highest
    valid_tokens: int
    test_tokens: int | None
    size: int
    band: float

    def config(self, **training: Any) -> Config:
        """The project's config of data and training; the network's keys mean nothing in it."""
        return Config(
            dataset=self.dataset,
            tokenizer=self.tokenizer,
            split=self.split,
            cache_dir=self.cache_dir,
            block_size=self.context,
            device=self.device,
            adam_betas=(0.9, 0.99),
            optimizer_eps=1e-8,
            min_lr=0.0,
            weight_decay=self.weight_decay,
            threads=1,
            **training,
        )


@dataclass(frozen=True)
class Trial:
    """kind, amount: of the budget, `seconds` or `flops`, or steps of `recall`.

    final: whether the run is one of the table's, and reads the test split.
    """

    row: str
    kind: str
    amount: float
    optimizer: str
    lr: float
    batch: int
    seed: int
    final: bool

    def about(self) -> dict[str, Any]:
        return asdict(self)


def learning_rate_at(progress: float, lr: float, warmup: float, final: float) -> float:
    """Linear warm-up over the part `warmup` of a budget, then a cosine from lr to final · lr.

    Args:
        progress: 0 … 1, the part of the budget that is spent when the step ends.
    """
    if progress < warmup:
        return lr * progress / warmup
    rest = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, rest))))


def points(n: int = N_POINTS) -> list[float]:
    """The parts of a budget after which a run is validated; the last is all of it."""
    return [FIRST_POINT ** (1 - i / (n - 1)) for i in range(n)]


class Training:
    """A model under training by a budget; `run` spends it.

    Args:
        loss_function: `model.loss`, compiled or not.
        now: the clock's, for tests.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        data: TokenizedText,
        settings: Settings,
        trial: Trial,
        flops_per_token: int,
        now: Callable[[], float] | None = None,
    ):
        self.model, self.settings, self.trial = model, settings, trial
        self.device = next(model.parameters()).device
        self.precision = Precision(config, self.device)
        self.weights = Weights(model)
        self.optimizer = Optimizer(model, config, self.weights)
        self.loss_function: Callable[..., Any] = model.loss
        self.batches = RandomCrops(data.train.tokens, trial.batch, settings.context, trial.seed)
        self.bytes_per_token = data.valid.n_bytes / len(data.valid.tokens)
        self.validation = validation_windows(settings, data.valid.tokens)
        self.clock = Clock(self.device, now)
        self.step = 0
        self.lrs: list[float] = []
        self.flops_per_step = flops_per_token * trial.batch * settings.context
        self.grad_clip = config.grad_clip

    @property
    def tokens(self) -> int:
        return self.step * self.trial.batch * self.settings.context

    @property
    def spent(self) -> float:
        """Of the budget, in its unit."""
        if self.trial.kind == "flops":
            return self.step * self.flops_per_step
        return self.clock.seconds

    def warm_up(self) -> None:
        """Compile and allocate outside of the clock; model and optimizer stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for _ in range(WARM_UP_STEPS):
                self._backward(0)
        self.optimizer.zero_grad()

    def run(self, n_points: int = N_POINTS) -> list[dict[str, float]]:
        """Spend the budget; the curve, a point per validation.

        Raises:
            Diverged: a validation loss is not finite.
        """
        amount, due = self.trial.amount, points(n_points)
        curve: list[dict[str, float]] = []
        rates: list[float] = []
        while True:
            cost = self.spent / self.step if self.step else 0.0
            is_over = self.step > 0 and self.spent + cost / 2 >= amount
            if is_over or (self.step and self.spent >= due[0] * amount):
                due = [part for part in due[1:] if part * amount > self.spent] or due[-1:]
                curve.append(self._point())
                rates.append(matrix_rate(self.device))
            if is_over:
                self.rate = statistics.median(rates)
                return curve
            progress = min(1.0, (self.spent + (cost or amount / 1000)) / amount)
            self._update(progress)

    def _update(self, progress: float) -> None:
        s = self.settings
        lr = learning_rate_at(progress, self.trial.lr, s.warmup, s.final_lr)
        self.optimizer.set_lr(lr)
        with self.clock.running():
            self._backward(self.step)
            self.precision.update(self.optimizer, self.weights, self.grad_clip)
            self.optimizer.zero_grad()
        self.lrs.append(lr)
        self.step += 1

    def _backward(self, step: int) -> None:
        inputs, targets = (part.to(self.device) for part in self.batches[step])
        with self.precision.autocast():
            loss, _ = self.loss_function(inputs, targets)
        self.precision.backward(loss)

    def _point(self) -> dict[str, float]:
        nats = self.validate()
        if not math.isfinite(nats):
            raise Diverged(f"the validation loss is {nats} after {self.step} steps")
        return {
            "step": self.step,
            "seconds": round(self.clock.seconds, 3),
            "tokens": self.tokens,
            "flops": self.step * self.flops_per_step,
            "valid_bits_per_byte": round(nats / math.log(2) / self.bytes_per_token, 5),
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean nats per token over the fixed windows."""
        self.model.eval()
        total, n = 0.0, 0
        for inputs, targets in self.validation:
            with self.precision.autocast():
                losses = self.model.token_losses(inputs.to(self.device), targets.to(self.device))
            total += float(losses.sum(dtype=torch.float64))
            n += targets.numel()
        self.model.train()
        return total / n


class Diverged(Exception):
    """A loss is not finite; the message says which."""


def validation_windows(settings: Settings, tokens: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """The same evenly spaced windows for every run, whatever its batch."""
    windows = max(1, settings.valid_tokens // settings.context)
    at_once = min(windows, max(1, EVALUATED_POSITIONS // settings.context))
    config = settings.config(micro_batch_size=at_once, eval_batches=max(1, windows // at_once))
    return validation_batches(config, tokens)


def run_trial(trial: Trial, settings: Settings, data: TokenizedText) -> dict[str, Any]:
    """Train one model and measure it: a row for the file of results.

    Raises:
        UserError: the model cannot be built or is not of the size of the others.
    """
    use_threads(1)
    keep_freed_memory()
    device = resolve_device(settings.device)
    config = settings.config(
        optimizer=trial.optimizer, lr=trial.lr, micro_batch_size=trial.batch, seed=trial.seed
    )
    torch.manual_seed(trial.seed)
    if trial.kind == "recall":
        return recalled(trial, config, settings, device)
    before = resident_bytes(device)
    with device:
        model = build_row(trial.row, data.tokenizer.vocab_size, settings.context)
    check_size(trial.row, model, settings.size, settings.band)
    flops = flops_per_token(model, settings.context)
    reset_peak()
    training = Training(model, config, data, settings, trial, flops)
    if settings.compile:
        training.loss_function = torch.compile(model.loss, dynamic=False)
    training.warm_up()
    about = {
        "n_params": n_params(model),
        "body_params": body_params(model),
        "flops_per_token": flops,
    }
    try:
        curve = training.run(N_POINTS if trial.final else 3)
    except Diverged as error:
        return {**about, "diverged": str(error)}
    last = curve[-1]
    result = {
        **about,
        **{key: last[key] for key in ("step", "seconds", "tokens", "flops")},
        "valid_bits_per_byte": last["valid_bits_per_byte"],
        "tokens_per_second": round(last["tokens"] / last["seconds"], 1),
        "matrix_rate": round(training.rate / 1e9, 1),  # GFLOP/s
        "training_bytes": None if before is None else max(0, peak_bytes(device) - before),
        "curve": curve,
    }
    if trial.final:
        del training
        result["test"] = tested(model, data, settings, device)
        result["decode_milliseconds"] = decode_milliseconds(model, data, settings, device)
        result["needles"] = needles(model, data, settings)
    return result


def recalled(
    trial: Trial, config: Config, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """A model of the row trained on multi-query recall alone; the share of right answers."""
    task = MultiQueryRecall()
    with device:
        model = build_row(trial.row, task.vocab_size, task.length)
    optimizer, precision = Optimizer(model, config), Precision(config, device)
    steps = int(trial.amount)
    recall = Recall(config.replace(eval_batches=16, max_steps=steps), model, task, device)
    for step in range(steps):
        progress = (step + 1) / steps
        optimizer.set_lr(learning_rate_at(progress, trial.lr, settings.warmup, settings.final_lr))
        batch = [tuple(part.to(device) for part in one) for one in recall.batch(step)]
        for loss in recall.losses(step, batch):
            precision.backward(loss)
        precision.update(optimizer, Weights(model), config.grad_clip)
        optimizer.zero_grad()
    n = RECALL_EXAMPLES
    found = {part: recall.asked(part, n, streamed=False) for part in ("valid", "test")}
    if not math.isfinite(found["valid"]["nats"]):
        return {"diverged": f"the loss is {found['valid']['nats']} after {steps} steps"}
    return {
        "step": steps,
        "valid_accuracy": found["valid"]["accuracy"],
        "test_accuracy": found["test"]["accuracy"],
    }


# --- after training ------------------------------------------------------------------------------


def tested(
    model: nn.Module, data: TokenizedText, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Bits per byte of the test split, by windows and as one text; None where it cannot be."""
    split = data.test
    if settings.test_tokens is not None and settings.test_tokens < len(split.tokens):
        tokens = split.tokens[: settings.test_tokens]
        sizes = [len(data.tokenizer.token_bytes(i)) for i in range(data.tokenizer.vocab_size)]
        split = TokenSplit(tokens, int(np.array(sizes)[tokens].sum()))
    n_bytes = split.n_bytes - len(data.tokenizer.token_bytes(int(split.tokens[0])))
    nats, _ = score(
        model,
        split.tokens,
        block_size=settings.context,
        stride=max(1, settings.context // 2),
        batch_size=max(1, EVALUATED_POSITIONS // settings.context),
        device=device,
    )
    figures = {"sliding": nats}
    if model.longest is None:
        figures["streaming"] = stream_nats(model, split.tokens)
    bits = {name: round(nats / math.log(2) / n_bytes, 5) for name, nats in figures.items()}
    return {"streaming": None, **bits, "bytes": n_bytes}


def stream_nats(model: nn.Module, tokens: np.ndarray) -> float:
    """Summed nats of tokens 1 … N − 1, each read with the whole text before it as its state.

    Where the model has a running mean it is that of as many positions as a window of training had.
    """
    decoder = Decoder(model, context="auto", adapt=False)
    total, state, n = 0.0, None, len(tokens) - 1
    for start in range(0, n, STREAM_CHUNK):
        chunk = torch.from_numpy(tokens[start : start + STREAM_CHUNK + 1].astype(np.int64))
        chunk = chunk[: n - start + 1].to(decoder.device)
        logits, state = decoder.read(chunk[None, :-1], state)
        losses = nn.functional.cross_entropy(logits[0], chunk[1:], reduction="none")
        total += float(losses.sum(dtype=torch.float64))
    return total


def decode_milliseconds(
    model: nn.Module, data: TokenizedText, settings: Settings, device: torch.device
) -> float:
    """What one more token of one text costs, half a context into it; the median of some."""
    prompt = data.valid.tokens[: max(1, settings.context // 2)].astype(np.int64)
    decoder = Decoder(model, adapt=False)
    n = min(DECODED_TOKENS, settings.context - len(prompt))
    logits, state = decoder.prefill([prompt.tolist()])
    session = decoder.start(state)
    token = logits.argmax(-1, keepdim=True)
    marks = []
    clock = Clock(device)
    for _ in range(max(1, n)):
        with clock.running():
            token = session.decode(token)[:, -1].argmax(-1, keepdim=True)
        marks.append(clock.seconds)
    steps = [b - a for a, b in itertools.pairwise([0.0, *marks])]
    return round(statistics.median(steps) * 1000, 3)


def needles(
    model: nn.Module, data: TokenizedText, settings: Settings
) -> list[dict[str, float]] | None:
    """Sentences of the validation split that come again, near and far; None in a short context.

    `near` is a quarter of a context behind, within reach of all; `far` four contexts. For each the
    share of right tokens the second time (`again`), and without the first (`unseen`).
    """
    near, far = settings.context // 4, 4 * settings.context
    tokens, lead = data.valid.tokens, near
    if near < SHORTEST or len(tokens) < 2 * far:
        return None
    distances = [near] if model.longest is not None else [near, far]
    # Of all rows the same sentences, though some are not asked from far.
    found = find_needles(
        tokens, data.tokenizer.token_bytes, NEEDLES, lead=lead, distances=(near, far)
    )
    rows = evaluate(model, tokens, found, lead=lead, distances=distances)
    return [
        {
            "distance": row["distance"],
            "again": round(row["again"]["accuracy"], 4),
            "unseen": round(row["unseen"]["accuracy"], 4),
        }
        for row in rows
    ]


def check_data(data: TokenizedText) -> None:
    """Raise `UserError` for data without a test split, or that are no text."""
    if data.test is None:
        raise UserError(
            f"{data.name} has no test split, which the table is about; give one, or --split with"
            " three fractions above 0"
        )
    if not data.valid.n_bytes:
        raise UserError(f"{data.name} is no text, and the table is in bits per byte")
