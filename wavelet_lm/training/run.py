"""A whole run: from a config to a trained, evaluated model that has written its first text."""

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wavelet_lm.config import Config
from wavelet_lm.data.dataset import TokenizedText, prepare_data
from wavelet_lm.data.tokenizers import GPT2_VOCAB, Tokenizer, load_tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.inference.loading import find_own_checkpoint
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.models.registry import build_model, model_without_weights, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.changes import LENGTH, changed_config, refuse_other_flags, words
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.conclusion import conclude
from wavelet_lm.training.language import LanguageModelling, total_steps
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import (
    refuse_large_model_on_cpu,
    refuse_what_cannot_train,
)
from wavelet_lm.training.run_folder import RunFolder, check_folder
from wavelet_lm.training.runs_table import check_table
from wavelet_lm.training.saved_state import open_saved
from wavelet_lm.training.summary import announcement


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
        task = LanguageModelling(config, model, data, device)
        trainer = Trainer(config, task, run, total_steps(config, data))
        if data.test is not None and len(data.test.tokens) < 2:
            raise UserError("the test split has 1 token; give more text or change split")
    except UserError:  # no run has begun, so no folder of one should be found
        shutil.rmtree(run.path)
        raise
    for line in announcement(trainer):
        run.log(line)
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
    checkpoint = open_saved(run.last)
    saved = checkpoint.metadata
    config, changes = changed_config(run, checkpoint, flags)
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
    trainer = Trainer(config, LanguageModelling(config, model, data, device), run, steps)
    run.remove_temporary_files()
    trainer.restore(checkpoint, changed=bool(changes))
    run.drop_metrics_after(trainer.progress.step, trainer.progress.evaluated_step)
    run.log(f"resumed at step {saved['step']} of {steps}: {run.command}")
    if changes:
        # The checkpoint first: where it is newer than config.json, flags can still say what holds.
        trainer.save()
        run.write_config(config, [*run.changes(), {"step": saved["step"], **changes}])
        run.log(f"from step {saved['step']} on: {words(changes)}")
    return _finish(trainer)


def _finished(path: str | Path, step: int) -> UserError:
    return UserError(
        f"{path}: this run is finished at step {step}; --max_steps N with N above {step} trains it"
        " longer, --init_from starts a new one from it"
    )


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
    refuse_what_cannot_train(model_without_weights(config, vocab_size), device)
    with device:
        return build_model(config, vocab_size)


def _finish(trainer: Trainer) -> RunFolder:
    """Train to the end, then conclude the run."""
    run, config, task = trainer.run, trainer.config, trainer.task
    task.loss_function = compiled(task.model, config, task.device, run.log)
    trainer.train()
    try:
        conclude(trainer)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise Interrupted(
            getattr(stop, "signum", signal.SIGINT),
            f"stopped after the training, which is saved; evaluate it with: {run.go_on}",
        ) from None
    return run
