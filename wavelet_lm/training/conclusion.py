"""The end of a language model's run: its best weights are evaluated and write their first text."""

import shlex

from wavelet_lm.data.modalities import Modality
from wavelet_lm.errors import UserError
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.models.checkpoint import load_own_model
from wavelet_lm.tables import table
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.loss_picture import draw_losses
from wavelet_lm.training.processes import command_words
from wavelet_lm.training.runs_table import append_run, row_line
from wavelet_lm.training.samples import keep, sample
from wavelet_lm.training.summary import row_of


def conclude(trainer: Trainer) -> None:
    """Evaluate the best weights, write a first text, add the row."""
    run, config, done, task = trainer.run, trainer.config, trainer.progress, trainer.task
    run.log(
        f"trained {done.total_steps:,} steps in {done.seconds / 60:.1f} minutes;"
        f" evaluating {run.best.name} of step {done.best_step}"
    )
    results = evaluate_run(run.path, device=str(task.device), log=lambda message: None)
    run.write_metrics(event="test", step=done.step, **results)
    for line in table(results).splitlines():
        run.log(line)
    _write_sample(trainer)
    if config.runs_file:
        _add_row(trainer, row_of(trainer, results))
    if config.loss_plot:
        run.log(draw_losses(run))
    run.write_metrics(event="end", step=done.step, seconds=round(done.seconds, 3))
    tokenizer, flags = task.data.tokenizer, ["--prompt", config.generation_prompt]
    if isinstance(tokenizer, Modality):
        flags = ["--out", f"more{tokenizer.output}"]
    command = [*command_words("generate"), "--checkpoint", str(run.path), *flags]
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
    run, done, tokenizer = trainer.run, trainer.progress, trainer.task.data.tokenizer
    model = load_own_model(run.best, trainer.task.device)
    try:
        found = sample(model, tokenizer, trainer.config)
    except UserError as error:  # such as a prompt that a char vocabulary cannot spell
        run.log(f"no sample: {error}")
        return
    if found.completion.reason == "interrupted":
        raise KeyboardInterrupt
    keep(run, tokenizer, found)
    text = found.completion.text
    is_text = not isinstance(tokenizer, Modality)
    run.log(f"a sample:\n{found.prompt}{text}\n" if is_text else f"a sample: {text}")
    run.write_metrics(
        event="sample", step=done.step, best_step=done.best_step, prompt=found.prompt, text=text
    )
