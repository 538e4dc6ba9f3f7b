"""A grid of runs, trained one after the other or side by side, and the table that compares them.

    python train.py --config configs/quickstart.json --set lr=0.003,0.01 --set layers=1,2

    python train.py --config configs/quickstart.json --set lr=0.003,0.01 --devices cuda:0,cuda:1

A member of a sweep is the run that `train.py` would make of the same options: same seed, same
folder, same figures. One that fails leaves its reason in the table and the next one starts.
"""

import contextlib
import gc
import itertools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from wavelet_lm.atomic_files import append_line, as_user_error, write_text
from wavelet_lm.config import (
    FIELDS,
    Config,
    ConfigError,
    check_values,
    parse_value,
    read_json_object,
    show,
)
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments.side_by_side import Ended, SideBySide, threads_each
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.memory_estimate import reset_peak
from wavelet_lm.training.provenance import command_line
from wavelet_lm.training.run import train
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.runs_table import check_table

Values = dict[str, Any]

FIGURES = ("bits/byte", "nats/token", "best step", "parameters", "tokens/s", "minutes", "run")
DONE = "done"
OF_THE_SWEEP = ("--set", "--sweep", "--devices")  # no flags of a member
# The console command as an argument of Python.
CONSOLE = "from wavelet_lm.cli.main import main; main()"
STOPPED = [128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def read_grid(assignments: list[str], file: str | None, fixed: Values) -> list[Values]:
    """The members of a sweep, each as what it sets.

    Args:
        assignments: `KEY=V1,V2,…`, the values of list-valued keys apart by semicolons.
        file: a JSON object of lists by key.
        fixed: options given beside the grid, which may not be in it too.

    Raises:
        ConfigError: a key or a value that is none, or a key or a value that is given twice.
    """
    axes: dict[str, list[Any]] = {}

    def add(key: str, values: list[Any], source: str) -> None:
        if key in axes or key in fixed:
            raise ConfigError(f"{source}: {key} is given twice; write all its values in one place")
        for value in values:
            check_values({key: value}, source)
            if values.count(value) > 1:
                raise ConfigError(f"{source}: {key} lists {show(value)} twice")
        axes[key] = values

    for key, values in (read_json_object(file) if file else {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: {key} is {values!r}; it must be a list of values to try")
        add(key, values, str(file))
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set is {assignment!r}; it must be KEY=V1,V2,…")
        if key not in FIELDS:
            check_values({key: None}, "--set")
        separator = ";" if FIELDS[key].type.startswith("tuple") else ","
        add(key, [parse_value(key, part) for part in text.split(separator)], "--set")
    if not axes:
        raise ConfigError(f"{file}: is empty; it must hold a list of values for each key to sweep")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    members: list[Values],
    values_of: Callable[[Values], Values],
    source: str = "config",
    log: Callable[[str], None] = print,
    devices: Sequence[str] = (),
) -> Path:
    """Train all members, in sequence or side by side; leave and print the table.

    Args:
        members: from `read_grid`.
        values_of: all values of a member's config.
        source: what to call the config in messages.
        devices: train a member on each of them at a time, as the command that a user would type;
            none = in this process, one after the other.

    Returns:
        The table, `out_dir/sweep_<timestamp>.md`. It is written anew after every member.

    Raises:
        ConfigError: a value of the config that is not allowed; nothing is trained.
        UserError: the table of runs cannot be written, or every member failed.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    configs = [values_of(member) for member in members]
    for values in configs:
        check_values(values, source)
        if values.get("benchmark_only"):
            raise ConfigError("a sweep trains and benchmark_only does not; give one of them")
        check_table(values.get("runs_file", FIELDS["runs_file"].default))
    file = _new_file(configs[0].get("out_dir", FIELDS["out_dir"].default))
    title = f"# Sweep\n\n`{command_line()}`, {datetime.now():%Y-%m-%d}.\n\n"
    log(f"sweep of {len(members)} runs; their table will be {file}")
    if devices:
        given = any("threads" in values and values["threads"] != "auto" for values in configs)
        threads = [] if given else ["--threads", str(threads_each(devices))]
        rows = _train_on(devices, members, file, title, log, threads)
    else:
        rows = _train_in_turn(members, configs, source, file, title, log)
    _conclude(file, title, rows, log)
    if not any(row["result"] == DONE for row in rows):
        raise UserError(f"all {len(members)} runs of the sweep failed; {file} says why")
    return file


def _train_in_turn(
    members: list[Values],
    configs: list[Values],
    source: str,
    file: Path,
    title: str,
    log: Callable[[str], None],
) -> list[dict[str, str]]:
    """The rows of all members, trained in this process."""
    rows: list[dict[str, str]] = []
    for i, (member, values) in enumerate(zip(members, configs, strict=True)):
        log(f"\nrun {i + 1} of {len(members)}: {_words(member)}")
        rows.append({key: show(value) for key, value in member.items()})
        forget_the_last_run()
        try:
            rows[-1] |= _figures(train(Config.from_dict(values, source), _command(member)))
        except (KeyboardInterrupt, Interrupted) as stop:
            rows[-1]["result"] = "stopped"
            _conclude(file, title, rows, log)
            left = members[i + 1 :] if "--resume" in str(stop) else members[i:]
            for command in map(_command, left):
                log(f"left to train: {command}")
            raise Interrupted(
                getattr(stop, "signum", signal.SIGINT),
                f"{stop or 'stopped'}; {len(left)} runs of the sweep are left, listed above",
            ) from None
        except UserError as error:
            rows[-1]["result"] = f"failed: {error}"
            log(rows[-1]["result"])
        except Exception as error:
            traces = file.with_suffix(".log")
            append_line(traces, f"{_words(member)}\n{traceback.format_exc()}")
            rows[-1]["result"] = f"failed: {type(error).__name__}, see {traces}"
            log(rows[-1]["result"])
        write_text(file, title + table(rows))
    return rows


def _train_on(
    devices: Sequence[str],
    members: list[Values],
    file: Path,
    title: str,
    log: Callable[[str], None],
    threads: list[str],
) -> list[dict[str, str]]:
    """The rows of all members, trained in a process for each device.

    Args:
        threads: words of every command that say how many it has.
    """
    rows = [{key: show(value) for key, value in member.items()} for member in members]
    logs = file.with_suffix("")
    logs.mkdir()
    side = SideBySide([[*_words_of(member), *threads] for member in members], devices, logs)
    log(f"on {', '.join(devices)}, {len(devices)} at a time; what they say is kept in {logs}")

    def note(ended: Ended) -> None:
        row = rows[ended.number]
        if ended.status == 0 and ended.run is not None:
            row |= _figures(RunFolder.open(ended.run))
        elif ended.status in STOPPED:
            row["result"] = "stopped"
        else:
            reason = ended.words if ended.status == 2 else f"see {side.log_of(ended.number)}"
            row["result"] = f"failed: {reason}"
        log(
            f"run {ended.number + 1} of {len(members)}, {_words(members[ended.number])}: "
            f"{row['result']}"
        )
        write_text(file, title + table([row for row in rows if "result" in row]))

    try:
        while (ended := side.next_end()) is not None:
            note(ended)
    except (KeyboardInterrupt, Interrupted) as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        left = side.stop(signum)
        while (ended := side.next_end()) is not None:
            note(ended)
            if ended.status in STOPPED:
                log(ended.words)
        _conclude(file, title, [row for row in rows if "result" in row], log)
        for number in left:
            log(f"left to train: {_command(members[number])}")
        raise Interrupted(
            signum, f"stopped; {len(left)} runs of the sweep are left, listed above"
        ) from None
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Rows as an aligned Markdown table, best validation first, failed ones last."""
    swept = [key for key in rows[0] if key not in (*FIGURES, "result")]
    columns = [*swept, *FIGURES, "result"]
    order = sorted(rows, key=_validation)
    lines = [columns, *([_cell(row.get(column, "")) for column in columns] for row in order)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = len("result")  # reasons are long and may stick out
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def _validation(row: dict[str, str]) -> tuple[float, ...]:
    """What is no text has nats per token alone."""
    return tuple(float(row.get(figure) or "inf") for figure in ("bits/byte", "nats/token"))


def _figures(run: RunFolder) -> dict[str, str]:
    """What the table says of a finished run: its best checkpoint, on the validation split."""
    metrics = run.metrics()
    step = Checkpoint(run.best).metadata["step"]
    best = next(row for row in metrics if row["event"] == "eval" and row["step"] == step)
    last = {row["event"]: row for row in metrics}
    return {
        "bits/byte": "" if best["bits_per_byte"] is None else f"{best['bits_per_byte']:.4f}",
        "nats/token": f"{best['val_loss']:.4f}",
        "best step": str(step),
        "parameters": f"{last['test']['n_params']:,}",
        "tokens/s": f"{last['train']['tokens_per_second']:,.0f}",
        "minutes": f"{last['end']['seconds'] / 60:.2f}",
        "run": str(run.path),
        "result": DONE,
    }


def _conclude(
    file: Path, title: str, rows: list[dict[str, str]], log: Callable[[str], None]
) -> None:
    text = table(rows)
    write_text(file, title + text)
    log(f"\n{text}\nadded to {file}")


def _new_file(out_dir: str) -> Path:
    """`sweep_<timestamp>.md` beside the run folders, numbered if two start in one second."""
    folder = Path(out_dir).expanduser()
    name = f"sweep_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            file = folder / (f"{name}.md" if number == 1 else f"{name}_{number}.md")
            with contextlib.suppress(FileExistsError):
                file.touch(exist_ok=False)
                return file
    except OSError as error:
        raise as_user_error(error, folder) from error
    raise AssertionError("the numbers do not end")


def forget_the_last_run() -> None:
    """Give back memory and compiled code, and measure the peak anew."""
    gc.collect()
    reset_peak()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # or it gives up after a few models of different shapes


def _arguments(typed: list[str], member: Values) -> list[str]:
    """The arguments that were typed, with a member's values in place of the sweep."""
    words, rest = [], iter(typed)
    for word in rest:
        if word in OF_THE_SWEEP:
            next(rest, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in OF_THE_SWEEP)):
            words.append(word)
    for key, value in member.items():
        words += [f"--{key}", value if isinstance(value, str) else show(value)]
    return words


def _command(member: Values) -> str:
    """What trains a member alone."""
    return command_line(_arguments(sys.argv[1:], member))


def _words_of(member: Values) -> list[str]:
    """The same as arguments of Python."""
    words = _arguments(sys.argv[1:], member)
    if sys.argv[0].startswith("wavelet-lm "):
        return ["-c", CONSOLE, *sys.argv[0].split()[1:], *words]
    return [sys.argv[0], *words]


def _words(member: Values) -> str:
    return ", ".join(f"{key} {show(value)}" for key, value in member.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
