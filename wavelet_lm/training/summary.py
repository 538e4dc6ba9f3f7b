"""A run in words: what it is before it starts, and its row in the table when it is finished."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from wavelet_lm.config import Config
from wavelet_lm.models.registry import n_params
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import GiB, estimate, peak_bytes


def announcement(trainer: Trainer) -> Iterator[str]:
    """The lines of the log before the first step of a language model."""
    config, task, data = trainer.config, trainer.task, trainer.task.data
    size, vocab_size = n_params(task.model), data.tokenizer.vocab_size
    needed = estimate(task.model, task.device)
    yield f"run folder {trainer.run.path}"
    yield (
        f"{data.name}: {len(data.train.tokens):,} training tokens, vocabulary {vocab_size:,}"
        f" ({data.tokenizer.name})"
    )
    yield (
        f"{size:,} parameters in {config.layers} block{'s' * (config.layers > 1)}"
        f" of {config.C} channels, {_parts(config)}; about {needed.peak / GiB:.2f} GiB to train on"
        f" {task.device} in {str(trainer.precision.dtype).removeprefix('torch.')}"
    )
    yield f"{trainer.progress.total_steps:,} steps of {task.per_step:,} tokens, {config.optimizer}"
    crosses = config.model == "wavelet_lm" and config.decompose_bypass_cross_window
    if crosses and config.data_order == "random":
        yield "decompose_bypass_cross_window has no effect with data_order random"


def _parts(config: Config) -> str:
    """What a block consists of, in words."""
    if config.model == "wavelet_lm":
        return f"{config.n_scales} scales"
    module = f", {config.wavelet_module} averages" if config.model == "wavelet_gpt" else ""
    return f"{config.heads} heads{module}"


def _settings(config: Config) -> str:
    """The network in a few words."""
    size = f"C {config.C}, layers {config.layers}"
    if config.model == "wavelet_lm":
        return f"{size}, levels {config.levels}"
    return f"{config.model}, {size}, {_parts(config)}"


def row_of(trainer: Trainer, results: dict[str, Any]) -> dict[str, str]:
    """The run's line of `runs.md`.

    Args:
        results: of the evaluation of its best weights.
    """
    config, progress, sliding = trainer.config, trainer.progress, results["sliding"]
    word_perplexity, bits_per_byte = sliding["word_perplexity"], sliding["bits_per_byte"]
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "name": trainer.run.name,
        "data": results["dataset"],
        "parameters": f"{results['n_params']:,}",
        "key settings": (
            f"{_settings(config)}, block {config.block_size}, {results['tokenizer']},"
            f" {config.optimizer} {config.lr:g}, {progress.total_steps} steps"
        ),
        "split": results["split"],
        # What is no text has no bytes; its figure says what it is.
        "bits/byte": (
            f"{sliding['nll']:.4f} nats/token" if bits_per_byte is None else f"{bits_per_byte:.4f}"
        ),
        "perplexity/word": f"{word_perplexity:.2f}" if word_perplexity else "",
        "tokens/s": f"{trainer.report.per_second:,.0f}",
        "peak memory": f"{peak_bytes(trainer.task.device) / GiB:.2f} GiB",
        "hours": f"{progress.seconds / 3600:.2f}",
        "command": f"`{trainer.run.command}`",
    }
