"""What a run may be resumed with, so that it is still the same run.

`--resume RUN --max_steps 2000 --lr 0.005` trains on from where the run stands, with other values of
these keys. The run's config.json then has the values in force and, under `changes`, one object per
resumption that changed any: its step, and `[before, after]` by key.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wavelet_lm.config import Config, show
from wavelet_lm.errors import UserError
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.saved_files import Saved

# Where things lie, what computes, who watches: these may also be edited in the run's config.json.
PLACES = (
    "dataset",
    "cache_dir",
    "device",
    "threads",
    "compile",
    "parallel",
    "fsdp_reshard",
    "fsdp_cpu_offload",
    "rank_logs",
    "keep_checkpoints",
    "track",
    "sample_interval",
    "loss_plot",
    "out_dir",
    "runs_file",
    "init_from",
)
# How long the run is trained, at which rate, and how closely it is watched.
LENGTH = ("max_steps", "epochs")
# How much memory it takes; what is computed stays the same.
MEMORY = ("gradient_checkpointing", "optimizer_offload", "optimizer_in_backward")
SCHEDULE = (
    *LENGTH,
    "lr",
    "min_lr",
    "eval_interval",
    "eval_batches",
    "save_interval",
    "log_interval",
)
FLAGS = (*SCHEDULE, *MEMORY, *(key for key in PLACES if key != "init_from"))

Changes = dict[str, list[Any]]


def refuse_other_flags(path: str | Path, flags: Iterable[str]) -> None:
    """Raise `UserError` for a flag that would make another run of it."""
    refused = [key for key in flags if key not in FLAGS]
    if refused:
        raise UserError(
            f"--resume does not take --{refused[0]}, for the run would be another one; it takes"
            f" {', '.join(FLAGS)}; {new_run(path)}"
        )


def new_run(path: str | Path) -> str:
    """What to do where a run cannot go on as asked."""
    return (
        f"start a new run, with --init_from {path} where its weights keep their shapes, else with"
        f" --config {Path(path) / 'config.json'}"
    )


def changed_config(
    run: RunFolder, checkpoint: Saved, flags: dict[str, Any]
) -> tuple[Config, Changes]:
    """The config to go on with, and how it differs from that of the run's last checkpoint.

    Args:
        flags: new values of `FLAGS`, by key.

    Returns:
        The config, and `[before, after]` of each key that differs.

    Raises:
        UserError: config.json was edited where it may not be, or a new value is not allowed.
    """
    now, then = Config.from_json(run.config_file).to_dict(), checkpoint.config.to_dict()
    for key in now:
        if differ(now[key], then[key]) and key not in (*PLACES, *flags):
            advice = f"give --{key} to --resume, or" if key in FLAGS else "to change it,"
            raise UserError(
                f"{run.config_file}: {key} is {show(now[key])} but {checkpoint.path.name} is a"
                f" checkpoint of {show(then[key])}; {advice} {new_run(run.path)}"
            )
    if "epochs" in flags:  # which max_steps would take the place of
        flags = {"max_steps": None, **flags}
    config = Config.from_dict({**now, **flags}, "--resume")
    new = config.to_dict()
    return config, {key: [then[key], new[key]] for key in new if differ(new[key], then[key])}


def differ(a: Any, b: Any) -> bool:
    """Whether two values of a key are not the same; to Python 1 and true would be."""
    return show(a) != show(b)


def refuse_other_config(run: RunFolder, config: Config) -> None:
    """Raise `UserError` where a run that is gone on with is not what it is asked to be."""
    now, then = config.to_dict(), Config.from_json(run.config_file).to_dict()
    for key in now:
        if now[key] != then[key] and key not in PLACES:
            raise UserError(
                f"{run.config_file}: {key} was {show(then[key])} when the run began and is"
                f" {show(now[key])} now; put it back, or start again"
            )


def words(changes: Changes) -> str:
    """The changes for people."""
    return ", ".join(f"{key} {show(new)} (was {show(old)})" for key, (old, new) in changes.items())
