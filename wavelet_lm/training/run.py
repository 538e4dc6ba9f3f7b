"""A whole run: from a config to a trained, evaluated model that has written its first text."""

import shlex
import shutil
import signal
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wavelet_lm.config import Config
from wavelet_lm.data.batches import batch_size, steps_per_epoch
from wavelet_lm.data.dataset import TokenizedText, prepare_data
from wavelet_lm.data.modalities import Modality
from wavelet_lm.data.tokenizers import GPT2_VOCAB, Tokenizer, load_tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.inference.completion import Strategy, Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import encode_prompt
from wavelet_lm.inference.loading import find_own_checkpoint
from wavelet_lm.inference.rows import Request
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.record import RECORD, record
from wavelet_lm.models.checkpoint import Checkpoint, load_model
from wavelet_lm.models.registry import build_model, model_without_weights, n_params
from wavelet_lm.tables import table
from wavelet_lm.threads import use_threads
from wavelet_lm.training.changes import LENGTH, changed_config, refuse_other_flags, words
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.loop import SAVED, Trainer
from wavelet_lm.training.memory_estimate import (
    GiB,
    estimate_bytes,
    peak_bytes,
    refuse_large_model_on_cpu,
    refuse_what_cannot_fit,
)
from wavelet_lm.training.run_folder import RunFolder, check_folder
from wavelet_lm.training.runs_table import append_run, check_table, row_line

SAMPLE_TOKENS = 512


def train(config: Config, command: str | None = None) -> RunFolder:
    """Train a new model and leave its run folder.

    Raises:
        UserError: anything that the user can mend, before or during the run.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after saving.
    """
    use_threads(config.threads)
    check_table(config.runs_file)
    check_folder(config.out_dir)
    device = resolve_device(config.device)
    source = find_own_checkpoint(config.init_from) if config.init_from else None
    # Before any data is fetched: could this machine train it at all?
    vocab_size = GPT2_VOCAB if config.tokenizer in ("auto", "gpt2") else 1
    size = n_params(model_without_weights(config, vocab_size))
    refuse_large_model_on_cpu(config, size, device)
    messages: list[str] = []  # of before there is a folder to log them in

    def log(message: str) -> None:
        print(message)
        messages.append(message)

    data = prepare_data(config, tokenizer=_initial_tokenizer(config), log=log)
    torch.manual_seed(config.seed)
    model = _build(config, data, device)
    if source is not None:
        Checkpoint(source).load_into(model)
    run = RunFolder.create(config, data.name, command)
    try:
        for message in messages:
            run.note(message)
        data.tokenizer.save(run.tokenizer)
        trainer = Trainer(config, model, data, run, device, total_steps(config, data))
        if data.test is not None and len(data.test.tokens) < 2:
            raise UserError("the test split has 1 token; give more text or change split")
    except UserError:  # no run has begun, so no folder of one should be found
        shutil.rmtree(run.path)
        raise
    _announce(trainer)
    return _finish(trainer)


def resume(path: str | Path, flags: Mapping[str, Any] | None = None) -> RunFolder:
    """Go on with a stopped run as if it had never been stopped, or with a run otherwise.

    Args:
        flags: new values of keys that `training/changes.py` allows; a finished run goes on with
            more `max_steps` or `epochs`.

    Raises:
        UserError: anything that the user can mend, before or during the run.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after saving.
    """
    flags = dict(flags or {})
    refuse_other_flags(path, flags)
    run = RunFolder.open(path)
    ends = [row["step"] for row in run.metrics() if row["event"] == "end"]
    if not run.last.is_file():
        if ends:
            raise UserError(
                f"{path}: this run is finished and has no {run.last.name} to train on from;"
                f" --init_from {path} starts a new one"
            )
        raise UserError(f"{path}: stopped before its first checkpoint; start it again")
    checkpoint = Checkpoint(run.last)
    config, changes = changed_config(run, checkpoint, flags)
    saved = checkpoint.metadata
    if "total_steps" not in saved:
        raise UserError(f"{run.last}: holds weights only; start a new run with --init_from")
    checkpoint.require(SAVED)
    longer = any(key in changes for key in LENGTH)
    if not longer and saved["total_steps"] in ends:
        raise _finished(path, saved["step"])
    check_table(config.runs_file)
    use_threads(config.threads)
    device = resolve_device(config.device)
    data = prepare_data(config, tokenizer=load_tokenizer(run.path))
    steps = total_steps(config, data) if longer else saved["total_steps"]
    if steps < saved["step"]:
        raise UserError(
            f"{path}: {steps} steps are asked for and step {saved['step']} is reached already;"
            f" --max_steps {saved['step']} evaluates the run as it is"
        )
    if steps == saved["step"] and steps in ends:
        raise _finished(path, steps)
    model = _build(config, data, device)
    trainer = Trainer(config, model, data, run, device, steps)
    run.remove_temporary_files()
    trainer.restore(checkpoint, changed=bool(changes))
    run.drop_metrics_after(trainer.step, trainer.evaluated_step)
    run.log(f"resumed at step {trainer.step} of {trainer.total_steps}: {run.command}")
    if changes:
        # The checkpoint first: where it is newer than config.json, flags can still say what holds.
        trainer.save()
        run.write_config(config, [*run.changes(), {"step": trainer.step, **changes}])
        run.log(f"from step {trainer.step} on: {words(changes)}")
    return _finish(trainer)


def _finished(path: str | Path, step: int) -> UserError:
    return UserError(
        f"{path}: this run is finished at step {step}; --max_steps N with N above {step} trains it"
        " longer, --init_from starts a new one from it"
    )


def total_steps(config: Config, data: TokenizedText) -> int:
    """Optimizer steps of the run: `max_steps`, or `epochs` times the steps of one."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(config.epochs * steps_per_epoch(config, len(data.train.tokens))))


def _initial_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the run that the weights come from, None for a model from scratch."""
    if not config.init_from:
        return None
    tokenizer = load_tokenizer(config.init_from)
    if config.tokenizer not in ("auto", tokenizer.name):
        raise UserError(
            f"tokenizer is {config.tokenizer} but {config.init_from} was trained with"
            f" {tokenizer.name}; leave tokenizer at auto"
        )
    return tokenizer


def _build(config: Config, data: TokenizedText, device: torch.device) -> nn.Module:
    vocab_size = data.tokenizer.vocab_size
    size = n_params(model_without_weights(config, vocab_size))
    refuse_large_model_on_cpu(config, size, device)
    refuse_what_cannot_fit(config, estimate_bytes(config, size, vocab_size), device)
    with device:
        return build_model(config, vocab_size)


def _announce(trainer: Trainer) -> None:
    config, data, run = trainer.config, trainer.data, trainer.run
    size, vocab_size = n_params(trainer.model), data.tokenizer.vocab_size
    needed = estimate_bytes(config, size, vocab_size)
    tokens = batch_size(config) * config.block_size
    run.log(f"run folder {run.path}")
    run.log(
        f"{data.name}: {len(data.train.tokens):,} training tokens, vocabulary {vocab_size:,}"
        f" ({data.tokenizer.name})"
    )
    run.log(
        f"{size:,} parameters in {config.layers} blocks of {config.C} channels,"
        f" {_parts(config)}; about {needed / GiB:.2f} GiB to train on"
        f" {trainer.device} in {str(trainer.precision.dtype).removeprefix('torch.')}"
    )
    run.log(f"{trainer.total_steps:,} steps of {tokens:,} tokens, {config.optimizer}")
    crosses = config.model == "wavelet_lm" and config.decompose_bypass_cross_window
    if crosses and config.data_order == "random":
        run.log("decompose_bypass_cross_window has no effect with data_order random")


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


def _finish(trainer: Trainer) -> RunFolder:
    """Train to the end, then conclude the run."""
    run, config = trainer.run, trainer.config
    trainer.loss_function = compiled(trainer.model, config, trainer.device, run.log)
    trainer.train()
    try:
        _conclude(trainer)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise Interrupted(
            getattr(stop, "signum", signal.SIGINT),
            "stopped after the training, which is saved; evaluate it with:"
            f" python train.py --resume {shlex.quote(str(run.path))}",
        ) from None
    return run


def _conclude(trainer: Trainer) -> None:
    """Evaluate the best weights, write a first text, add the row."""
    run, config = trainer.run, trainer.config
    run.log(
        f"trained {trainer.total_steps:,} steps in {trainer.seconds / 60:.1f} minutes;"
        f" evaluating {run.best.name} of step {trainer.best_step}"
    )
    results = evaluate_run(run.path, device=str(trainer.device), log=lambda message: None)
    run.write_metrics(event="test", step=trainer.step, **results)
    for line in table(results).splitlines():
        run.log(line)
    _write_sample(trainer)
    if config.runs_file:
        _add_row(trainer, _row(trainer, results))
    run.write_metrics(event="end", step=trainer.step, seconds=round(trainer.seconds, 3))
    tokenizer, flags = trainer.data.tokenizer, ["--prompt", config.generation_prompt]
    if isinstance(tokenizer, Modality):
        flags = ["--out", f"more{tokenizer.output}"]
    command = ["python", "generate.py", "--checkpoint", str(run.path), *flags]
    run.log(f"more of it: {shlex.join(command)}")


def _add_row(trainer: Trainer, row: dict[str, str]) -> None:
    """Add the run's row; where that fails now, the run is finished all the same and keeps it."""
    run, table = trainer.run, trainer.config.runs_file
    try:
        append_run(table, row)
    except UserError as error:
        run.log(f"the run is finished, but without a row in {table}: {error}; the row is")
        run.log(row_line(row))
    else:
        run.log(f"added a row to {table}")


def _write_sample(trainer: Trainer) -> None:
    """Log a text of the best weights that starts with the config's prompt, and record it.

    What is no text has no such prompt, and goes to a file of the run folder.
    """
    run, config = trainer.run, trainer.config
    options = SamplingOptions(
        config.temperature, config.top_k, config.top_p, config.repetition_penalty
    )
    tokenizer = trainer.data.tokenizer
    is_text = not isinstance(tokenizer, Modality)
    prompt = config.generation_prompt if is_text else ""
    model = load_model(run.best, trainer.device)
    request = Request(config.seed, min(config.num_new_tokens, SAMPLE_TOKENS))
    try:
        writer = Writer(Decoder(model, context="auto"), model, tokenizer, Strategy(options))
        first = encode_prompt(tokenizer, prompt) if is_text else [tokenizer.start]
        reading = writer.read([first])
        (sample,) = writer.write(reading, [request])
    except UserError as error:  # such as a prompt that a char vocabulary cannot spell
        run.log(f"no sample: {error}")
        return
    if sample.reason == "interrupted":
        raise KeyboardInterrupt
    if is_text:
        run.log(f"a sample:\n{prompt}{sample.text}\n")
    else:
        sample.text = str(run.path / f"sample{tokenizer.output}")
        tokenizer.write(Path(sample.text), sample.tokens)
        run.log(f"a sample: {sample.text}")
    record(run.path / RECORD, run.command, prompt, sample, options)


def _row(trainer: Trainer, results: dict[str, Any]) -> dict[str, str]:
    """The run's line of `runs.md`."""
    config, sliding = trainer.config, results["sliding"]
    word_perplexity, bits_per_byte = sliding["word_perplexity"], sliding["bits_per_byte"]
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "name": trainer.run.name,
        "data": results["dataset"],
        "parameters": f"{results['n_params']:,}",
        "key settings": (
            f"{_settings(config)}, block {config.block_size}, {results['tokenizer']},"
            f" {config.optimizer} {config.lr:g}, {trainer.total_steps} steps"
        ),
        "split": results["split"],
        # What is no text has no bytes; its figure says what it is.
        "bits/byte": (
            f"{sliding['nll']:.4f} nats/token" if bits_per_byte is None else f"{bits_per_byte:.4f}"
        ),
        "perplexity/word": f"{word_perplexity:.2f}" if word_perplexity else "",
        "tokens/s": f"{trainer.tokens_per_second:,.0f}",
        "peak memory": f"{peak_bytes(trainer.device) / GiB:.2f} GiB",
        "hours": f"{trainer.seconds / 3600:.2f}",
        "command": f"`{trainer.run.command}`",
    }
