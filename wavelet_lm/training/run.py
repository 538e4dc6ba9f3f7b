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
from wavelet_lm.training.float8 import use_float8
from wavelet_lm.training.language import LanguageModelling, total_steps
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import refuse_large_model_on_cpu
from wavelet_lm.training.parallel_choice import chosen_parallel, refuse_another_number
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run_folder import RunFolder, SilentRunFolder, check_folder
from wavelet_lm.training.running import running
from wavelet_lm.training.runs_table import check_table
from wavelet_lm.training.saved_files import newest
from wavelet_lm.training.saved_state import require_state
from wavelet_lm.training.summary import announcement
from wavelet_lm.training.tracking import check_tracker, tracked
from wavelet_lm.training.weights import Weights


def train(config: Config, command: str | None = None, processes: Processes = ALONE) -> RunFolder:
    """Train a new model and leave its run folder.

    Args:
        command: that makes it; None is the one that was typed.
        processes: this one among those that train it together (`together.py`).

    Raises:
        UserError: anything that the user can mend, before or during the run.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after saving.
    """
    use_threads(config.threads)
    refuse_another_number(config, processes)
    check_table(config.runs_file)
    check_folder(config.out_dir)
    check_tracker(config)
    device = _device(config, processes)
    source = find_own_checkpoint(config.init_from) if config.init_from else None
    # Before any data is fetched: could this machine train it at all?
    vocab_size = GPT2_VOCAB if config.tokenizer in ("auto", "gpt2") else 1
    size = n_params(model_without_weights(config, vocab_size))
    refuse_large_model_on_cpu(config, size, device)
    messages: list[str] = []  # of before there is a folder to log them in

    def log(message: str) -> None:
        print(message)
        messages.append(message)

    tokenizer = _initial_tokenizer(config)
    data = processes.in_turn(lambda: prepare_data(config, tokenizer=tokenizer, log=log))
    torch.manual_seed(config.seed)
    model = _build(config, data, device, processes)
    processes.seed(config.seed)
    if source is not None:
        try:
            _weights(model, processes).load(Checkpoint(source))
        except UserError as error:
            raise UserError(
                f"{error}; without --init_from a new run begins with random weights"
            ) from None
    run = _new_folder(config, data.name, command, processes)
    try:
        for message in messages:
            run.note(message)
        if processes.is_main:
            data.tokenizer.save(run.tokenizer)
        task = LanguageModelling(config, model, data, device, processes)
        trainer = _trainer(config, task, run, total_steps(config, data))
        if data.test is not None and len(data.test.tokens) < 2:
            raise UserError("the test split has 1 token; give more text or change split")
    except UserError:  # no run has begun, so no folder of one should be found
        if processes.is_main:
            shutil.rmtree(run.path)
        raise
    for line in announcement(trainer):
        run.log(line)
    return _finish(trainer)


def resume(
    path: str | Path,
    flags: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> RunFolder:
    """Go on with a stopped run as if it had never been stopped, or with a run otherwise.

    Args:
        flags: new values of keys that `training/changes.py` allows; a finished run goes on with
            more `max_steps` or `epochs`.
        processes: this one among those that train it together; the run may have had others.

    Raises:
        UserError: anything that the user can mend, before or during the run.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after saving.
    """
    flags = dict(flags or {})
    refuse_other_flags(path, flags)
    run = _folder(RunFolder.open(path).path, processes)
    ends = [row["step"] for row in run.metrics() if row["event"] == "end"]
    checkpoint = newest(run, processes)
    if checkpoint is None:
        if ends:
            raise UserError(
                f"{path}: this run is finished and has no {run.last.name} to train on from;"
                f" --init_from {path} starts a new one"
            )
        raise UserError(f"{path}: stopped before its first checkpoint; start it again")
    require_state(checkpoint)
    saved = checkpoint.metadata
    config, changes = changed_config(run, checkpoint, flags)
    refuse_another_number(config, processes)
    longer = any(key in changes for key in LENGTH)
    if not longer and saved["total_steps"] in ends:
        raise _finished(path, saved["step"])
    check_table(config.runs_file)
    check_tracker(config)
    use_threads(config.threads)
    device = _device(config, processes)
    _log_apart(run, config, processes)
    tokenizer = load_tokenizer(run.path)
    data = processes.in_turn(lambda: prepare_data(config, tokenizer=tokenizer))
    steps = total_steps(config, data) if longer else saved["total_steps"]
    if steps < saved["step"]:
        raise UserError(
            f"{path}: {steps} steps are asked for and step {saved['step']} is reached already;"
            f" --max_steps {saved['step']} evaluates the run as it is"
        )
    if steps == saved["step"] and steps in ends:
        raise _finished(path, steps)
    model = _build(config, data, device, processes)
    task = LanguageModelling(config, model, data, device, processes)
    trainer = _trainer(config, task, run, steps)
    run.remove_temporary_files()
    processes.wait_for_all()
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


def _device(config: Config, processes: Processes) -> torch.device:
    device = resolve_device(processes.device_name(config.device))
    processes.connect(device)
    return device


def _build(
    config: Config, data: TokenizedText, device: torch.device, processes: Processes
) -> nn.Module:
    vocab_size = data.tokenizer.vocab_size
    shape = model_without_weights(config, vocab_size)
    if chosen_parallel(shape, device, processes) == "fsdp":
        from wavelet_lm.training.parallelize import sharded_model

        def build() -> nn.Module:
            model = build_model(config, vocab_size)
            if config.amp_dtype == "fp8":  # before its weights are shared out
                use_float8(model)
            return model

        return sharded_model(build, config, device, processes)
    with device:
        return build_model(config, vocab_size)


def _weights(model: nn.Module, processes: Processes) -> Weights:
    if processes.size == 1:
        return Weights(model)
    from wavelet_lm.training.parallelize import weights_of

    return weights_of(model, processes)


def _trainer(config: Config, task: LanguageModelling, run: RunFolder, steps: int) -> Trainer:
    processes, saver = task.processes, None
    if processes.size > 1:
        from wavelet_lm.training.sharded_checkpoint import ShardedSaver

        saver = ShardedSaver(run, config.keep_checkpoints, processes)
    return Trainer(config, task, run, steps, weights=_weights(task.model, processes), saver=saver)


def _new_folder(config: Config, name: str, command: str | None, processes: Processes) -> RunFolder:
    """The folder of a new run, which the first process makes."""
    path = processes.told(lambda: str(RunFolder.create(config, name, command).path))
    run = _folder(path, processes)
    run.command = command or run.command
    _log_apart(run, config, processes)
    return run


def _folder(path: str | Path, processes: Processes) -> RunFolder:
    return RunFolder(path) if processes.is_main else SilentRunFolder(path)


def _log_apart(run: RunFolder, config: Config, processes: Processes) -> None:
    if config.rank_logs and isinstance(run, SilentRunFolder):
        run.log_file = run.path / f"log_rank{processes.rank}.txt"


def _finish(trainer: Trainer) -> RunFolder:
    """Train to the end, then conclude the run, which the first process does alone."""
    run, config, task = trainer.run, trainer.config, trainer.task
    loss = compiled(task.model, config, task.device, run.log)
    if task.processes.size > 1:
        from wavelet_lm.training.parallelize import parallelize

        loss = parallelize(task.model, loss, task.device, task.n_passes)
    task.loss_function = loss
    with running(run), tracked(config, run, trainer.progress.step):
        trainer.train()
        if not task.processes.is_main:
            return run
        try:
            conclude(trainer)
        except (KeyboardInterrupt, Interrupted) as stop:
            raise Interrupted(
                getattr(stop, "signum", signal.SIGINT),
                f"stopped after the training, which is saved; evaluate it with: {run.go_on}",
            ) from None
    return run
