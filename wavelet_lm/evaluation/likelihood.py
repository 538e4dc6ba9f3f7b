"""How likely a text is under a model: nats per token, perplexities and bits per byte.

A text of N tokens has N − 1 targets, for its first token is never one. Windows of `block_size`
targets start every `stride` targets, each with no memory of what came before, and the last one is
as short as the text's end makes it. The first window scores all its targets, every later one only
those that no window before it has seen, so each target is scored once:

    stride = block_size          non-overlapping windows
    stride = block_size / 2      sliding windows: at least half a window of context after the first
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from wavelet_lm.devices import amp_dtype, autocast, reading, resolve_device
from wavelet_lm.errors import UserError

if TYPE_CHECKING:
    from wavelet_lm.config import Config
    from wavelet_lm.data.dataset import TokenSplit
    from wavelet_lm.data.tokenizers import Tokenizer
    from wavelet_lm.quantization.options import QuantizationOptions

# Positions of a batch of windows where no batch size is given.
BATCH_POSITIONS = 4096


class Sharing(Protocol):
    """Processes that share the windows of a text: what is asked of `training/processes.py`."""

    rank: int
    size: int

    def device_name(self, name: str) -> str:
        """The device of this process, where one is named for all."""

    def connect(self, device: torch.device) -> None:
        """Make ready to add up."""

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """What each makes, the first of each machine before the others there."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all of them of values [n]; for all."""


def score(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    block_size: int,
    stride: int,
    batch_size: int,
    device: torch.device,
    amp: AbstractContextManager | None = None,
    progress: Callable[[int], object] | None = None,
    among: Sharing | None = None,
) -> tuple[float, int]:
    """The summed negative log-likelihood of tokens 1 … N − 1 in nats, and their number N − 1.

    Args:
        model: `model.token_losses(idx, targets) -> [B, T]`, nats of each target.
        tokens: [N], N ≥ 2, any integer type; may be a memory map.
        block_size: targets of a window.
        stride: targets between the starts of windows, 1 … block_size.
        batch_size: windows at once.
        amp: autocast context to run in, re-enterable.
        progress: called with the number of targets scored by each batch.
        among: the processes that score a part of the batches each; all get the sums of all.
    """
    total = 0.0
    n_scored = 0
    batches = window_batches(len(tokens), block_size, stride, batch_size)
    if among is not None:
        batches = islice(batches, among.rank, None, among.size)
    for batch, n_context in batches:
        window = torch.from_numpy(tokens[batch].astype(np.int64)).to(device)
        with reading(model), amp or nullcontext():
            losses = model.token_losses(window[:, :-1], window[:, 1:])[:, n_context:]
        total += losses.double().sum().item()
        n_scored += losses.numel()
        if progress is not None:
            progress(losses.numel())
    if among is not None:
        sums = torch.tensor([total, n_scored], dtype=torch.float64, device=device)
        total, n_scored = among.total(sums).tolist()
    return total, int(n_scored)


def window_batches(
    n_tokens: int, block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Positions [B, T + 1] of the tokens of up to `batch_size` windows of one shape.

    With them comes the number of leading targets that serve as context only. The first window and
    a short last one are batches of their own where they differ from the rest.
    """
    if not 1 <= stride <= block_size or batch_size < 1 or n_tokens < 2:
        raise ValueError(f"{n_tokens=}, {block_size=}, {stride=}, {batch_size=}")
    n_targets = n_tokens - 1
    overlap = block_size - stride
    # A window that starts at s is the first to see the targets from s + overlap on.
    starts = np.arange(0, max(n_targets - overlap, 1), stride)
    is_full = starts + block_size <= n_targets
    first = is_full & (starts == 0) if overlap else np.zeros_like(is_full)
    groups = [starts[first], starts[is_full & ~first], starts[~is_full]]
    for group in groups:
        for i in range(0, len(group), batch_size):
            batch = group[i : i + batch_size, None]
            length = min(block_size, n_targets - int(batch[0, 0]))
            yield batch + np.arange(length + 1), 0 if batch[0, 0] == 0 else overlap


def evaluate(
    model: nn.Module,
    split: TokenSplit,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    amp: AbstractContextManager | None = None,
    progress: Callable[[int], object] | None = None,
    among: Sharing | None = None,
) -> dict[str, dict[str, Any]]:
    """Both protocols, `non_overlapping` and `sliding`, as plain numbers.

    Returns for each: `nll` (nats per token), `perplexity` (per token), `bits_per_byte` of the text
    after the first token, `word_perplexity` (over the data set's canonical number of words; None
    where there is none), `tokens` and `bytes` scored, `block_size`, `stride`, `seconds`. What is no
    text has no bytes: None.

    Raises:
        UserError: for fewer than two tokens, and for losses that are not finite.

    Examples:
        A model to which all bytes are equally likely needs 8 bits for each of them:

        >>> from wavelet_lm.data.dataset import TokenSplit
        >>> from wavelet_lm.data.tokenizers import ByteTokenizer
        >>> class Even(torch.nn.Module):
        ...     def token_losses(self, idx, targets):
        ...         return torch.full(targets.shape, math.log(256))
        >>> tokens = np.frombuffer(b"Anything at all", dtype=np.uint8)
        >>> split = TokenSplit(tokens, n_bytes=len(tokens))
        >>> results = evaluate(Even(), split, ByteTokenizer(), block_size=8)
        >>> round(results["sliding"]["bits_per_byte"], 4), results["sliding"]["tokens"]
        (8.0, 14)
    """
    if len(split.tokens) < 2:
        raise UserError(f"the split has {len(split.tokens)} tokens; at least 2 are needed")
    n_bytes = split.n_bytes - len(tokenizer.token_bytes(int(split.tokens[0])))
    results = {}
    for name, stride in strides(block_size).items():
        started = time.perf_counter()
        nats, n_tokens = score(
            model,
            split.tokens,
            block_size=block_size,
            stride=stride,
            batch_size=batch_size or max(1, BATCH_POSITIONS // block_size),
            device=torch.device(device),
            amp=amp,
            progress=progress,
            among=among,
        )
        if not math.isfinite(nats):
            raise UserError(
                "the model's losses are not finite; use a checkpoint before it diverged"
            )
        results[name] = {
            "nll": nats / n_tokens,
            "perplexity": _exp(nats / n_tokens),
            "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
            "word_perplexity": _exp(nats / split.n_words) if split.n_words else None,
            "tokens": n_tokens,
            "bytes": n_bytes if split.n_bytes else None,
            "block_size": block_size,
            "stride": stride,
            "seconds": time.perf_counter() - started,
        }
    return results


def strides(block_size: int) -> dict[str, int]:
    """The two protocols and their strides."""
    return {"non_overlapping": block_size, "sliding": max(1, block_size // 2)}


def evaluate_run(
    run: str | Path,
    split: str | None = None,
    *,
    dataset: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    quantization: QuantizationOptions | None = None,
    progress: Callable[[int], object] | None = None,
    log: Callable[[str], None] = print,
    among: Sharing | None = None,
) -> dict[str, Any]:
    """Evaluate a run folder or checkpoint on its own data, or on `dataset` with its tokenizer.

    Args:
        split: `train`, `valid` or `test`; None is test, or valid where there is no test split,
            and of a text of one's own (`dataset`) all of it.
        batch_size: windows at once; None suits the size of the run's windows.
        quantization: how to quantize the model and evaluate that as well; None asks its config.
        among: the processes that share the windows; each gets the figures of all of them.

    Returns:
        What `evaluate` does, and `run`, `dataset`, `split`, `tokenizer`, `n_params`; what
        `evaluate` says of the quantized model under `quantized`, with its `scheme` in words.
    """
    from wavelet_lm.inference.generation import check_vocabulary
    from wavelet_lm.inference.loading import load_model, load_tokenizer
    from wavelet_lm.models.registry import n_params
    from wavelet_lm.quantization.options import QuantizationOptions
    from wavelet_lm.quantization.quantize import quantize

    where = resolve_device(device if among is None else among.device_name(device))
    if among is not None:
        among.connect(where)
    model, tokenizer = load_model(run, where, log), load_tokenizer(run)
    check_vocabulary(model, tokenizer)
    found = partial(split_of_run, model.config, tokenizer, split, dataset, log)
    name, split, chosen = found() if among is None else among.in_turn(found)
    config = model.config if dataset is None else model.config.replace(dataset=dataset)
    quantization = quantization or QuantizationOptions()
    scheme = quantization.scheme(model, str(run))
    calibration = None if scheme is None else quantization.calibration(config, tokenizer)
    precision = torch.float32 if where.type == "cpu" else amp_dtype(config, where)

    def evaluated(model: nn.Module) -> dict[str, Any]:
        return evaluate(
            model,
            chosen,
            tokenizer,
            block_size=config.block_size,
            batch_size=batch_size,
            device=where,
            amp=autocast(where, precision),
            progress=progress,
            among=among,
        )

    results = evaluated(model)
    if scheme is not None:
        quantized = quantize(model, scheme, calibration=calibration)
        results["quantized"] = {"scheme": scheme.describe(), **evaluated(quantized)}
    about = {
        "run": str(run),
        "dataset": name,
        "split": split,
        "tokenizer": tokenizer.name,
        "n_params": n_params(model),
    }
    return {**about, **results}


def split_of_run(
    config: Config,
    tokenizer: Tokenizer,
    split: str | None,
    dataset: str | None,
    log: Callable[[str], None],
) -> tuple[str, str, TokenSplit]:
    """The name of the data, that of the split, and its tokens, as `evaluate_run` chooses them."""
    from wavelet_lm.data.dataset import prepare_data, prepare_split

    if dataset is not None:
        return prepare_split(config.replace(dataset=dataset), tokenizer, split, log)
    data = prepare_data(config, tokenizer=tokenizer, log=log)
    name, split = data.name, split or ("test" if data.test is not None else "valid")
    if data.test is None and split == "valid":
        log(f"{name} has no test split; evaluating on valid")
    chosen: TokenSplit | None = getattr(data, split)
    if chosen is None:
        raise UserError(f"{name} has no {split} split; use --split valid")
    return name, split, chosen


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
