"""The command lines of the project: flags from the config's options, errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

from wavelet_lm.config import (
    FIELDS,
    GROUPS,
    ConfigError,
    Option,
    check_values,
    checked_value,
    keys_read_by,
    nearest,
    parse_value,
    read_config,
    show,
)
from wavelet_lm.errors import UserError

# Names from elsewhere that mean the same as one of ours; where a command has several of these, the
# first is meant. nanoGPT, Hugging Face and gpt-fast say them so.
ALIASES = {
    "checkpoint_path": ("checkpoint",),
    "draft_checkpoint_path": ("draft",),
    "gradient_accumulation_steps": ("grad_accum",),
    "learning_rate": ("lr",),
    "max_grad_norm": ("grad_clip",),
    "max_iters": ("max_steps",),
    "max_new_tokens": ("num_tokens", "num_new_tokens"),
    "n_embd": ("C",),
    "n_head": ("heads",),
    "n_layer": ("layers",),
    "num_return_sequences": ("n",),
    "num_samples": ("n",),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "speculate_k": ("draft_tokens",),
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser as every command of the project has one.

    Complaints are one line, and an unknown flag gets the nearest one. Flags may be written with
    hyphens, and by the names of `ALIASES`; `--version` is there.

    Args:
        run: what the run can be that the command needs, which is named first or by
            `--checkpoint` and parsed as `checkpoint`; None = the command takes none.
        needs_run: whether there must be one.
    """

    def __init__(self, *, run: str | None = None, needs_run: bool = True, **options: Any):
        super().__init__(**{"prog": program(), **options}, allow_abbrev=False)
        self._takes_run, self._needs_run = run is not None, needs_run
        if run is not None:
            default = {"metavar": "RUN", "default": None}
            self.add_argument("first", nargs="?", help=run, **default)
            self.add_argument("--checkpoint", help="the same, as a flag", **default)
        self.add_argument(
            "--version",
            action=_Version,
            nargs=0,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="print the version and leave",
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        if _only_parser.get():
            raise _Complete(self)
        args = self._settled(sys.argv[1:] if args is None else args)
        known, unknown = self.parse_known_args(args, namespace)
        flags = [text.split("=")[0] for text in unknown if text.startswith("--")]
        if flags:
            raise ConfigError(f"unknown option {flags[0]}{self._similar(flags[0])}")
        if self._takes_run:
            self._settle_run(known, unknown)
        if unknown:
            raise ConfigError(
                f"unexpected argument {unknown[0]!r}; options are written --key value"
            )
        return known

    def _ours(self, text: str) -> str:
        """A flag as this parser knows it, anything else as it is."""
        flag, equals, value = text.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return text
        name = flag[2:].replace("-", "_")
        for target in (name, *ALIASES.get(name, ())):
            if f"--{target}" in self._option_string_actions:
                return f"--{target}{equals}{value}"
        return text

    def _similar(self, flag: str) -> str:
        """A hint with the flag of ours that an unknown one may mean, by whichever of its names."""
        names = [name for action in self._actions for name in action.option_strings]
        typed = f"--{flag[2:].replace('-', '_')}"
        if hint := nearest(typed, names):
            return hint
        others = {f"--{name}": self._ours(f"--{name}") for name in ALIASES}
        matches = difflib.get_close_matches(typed, others, n=1, cutoff=0.6)
        ours = others[matches[0]] if matches else ""
        return f"; did you mean {ours}?" if ours in names else ""

    def _settled(self, args: Sequence[str]) -> list[str]:
        """The arguments with our flags, and values that begin with a dash joined to theirs.

        Raises:
            ConfigError: a value such as `---` or `-x`, which would be taken for a flag; the line
                says how it is written.
        """
        settled: list[str] = []
        rest = iter(args)
        for text in rest:
            if text == "--":  # no flags follow
                return [*settled, text, *rest]
            flag = self._ours(text)
            settled.append(flag)
            action = self._option_string_actions.get(flag)
            if action is None or action.nargs is not None or (value := next(rest, None)) is None:
                continue
            if not value.startswith("-") or value == "-":
                settled.append(value)
                continue
            is_flag = self._ours(value).partition("=")[0] in self._option_string_actions
            if is_flag or not (_reads_as_number(value) or any(map(str.isspace, value))):
                raise ConfigError(
                    f"{flag} needs a value, and {value!r} looks like an option; if it is the"
                    f" value, write {flag}={shlex.quote(value)}"
                )
            settled[-1] = f"{flag}={value}"
        return settled

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Up to Python 3.12 argparse drops a `--` that is a flag's value, then misses it.
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _settle_run(self, known: argparse.Namespace, unknown: list[str]) -> None:
        """The run, wherever it stands: one of first, last and `--checkpoint`."""
        first, flag = known.first, known.checkpoint
        del known.first
        if first is flag is None and unknown:  # argparse sees an optional argument in front alone
            first = unknown.pop(0)
        if first is not None and flag is not None and first != flag:
            raise ConfigError(
                f"{first!r} and --checkpoint {flag!r} both name the run; give one, and put a text"
                " of several words in quotes"
            )
        if self._needs_run and first is None and flag is None:
            raise ConfigError("which run? give RUN first, a run folder or checkpoint file")
        known.checkpoint = flag if first is None else first


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Whether a command is to build its parser and go no further, for `parser_of`.
_only_parser: ContextVar[bool] = ContextVar("only_parser", default=False)


class _Complete(Exception):
    """Carries a parser out of the command that has built it."""


def parser_of(main: Callable[[], None]) -> OneLineParser:
    """The parser of a command: its `main` is run up to where it would read what was typed."""
    token = _only_parser.set(True)
    try:
        main()
    except _Complete as complete:
        return complete.args[0]
    finally:
        _only_parser.reset(token)
    raise TypeError(f"{main.__module__} reads no command line")


class _Version(argparse.Action):
    """Print the version of the project and of what its results depend on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """The project's version, and that of what its results depend on."""
    from importlib.metadata import version

    from wavelet_lm import __version__

    return f"WaveletLM {__version__} (PyTorch {version('torch')})"


def program() -> str:
    """The command as it is typed: `wavelet-lm train`, `python train.py`, `python -m …`."""
    name = sys.argv[0]
    if name.startswith("wavelet-lm "):
        return name
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {Path(name).name}"


# What people change first; `--help` begins with it.
COMMON = (
    "dataset",
    "tokenizer",
    "model",
    "C",
    "layers",
    "levels",
    "block_size",
    "micro_batch_size",
    "grad_accum",
    "max_steps",
    "epochs",
    "optimizer",
    "lr",
    "min_lr",
    "warmup_fraction",
    "seed",
    "device",
    "threads",
    "compile",
    "eval_interval",
    "init_from",
    "out_dir",
)
EVERYTHING = "--help_all"


def add_config_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] = ()) -> None:
    """One `--key VALUE` per option, by group; `--key` and `--no_key` for booleans.

    `--help` shows what the chosen model and training read, the common ones first, and `--help_all`
    everything; all can be typed.

    Args:
        arguments: what was typed, which says the model; sys.argv's if empty.
    """
    words = [word.replace("-", "_") for word in (arguments or sys.argv[1:])]
    shows_all = EVERYTHING.replace("-", "_") in words
    read = keys_read_by(_chosen_model(arguments or sys.argv[1:]))
    groups = {name: parser.add_argument_group(name) for name in ("common options", *GROUPS)}
    n_hidden = 0
    for group, part in GROUPS.items():
        for spec in dataclasses.fields(part):
            is_read = spec.name in read if group == "model" else group in ("data", "training")
            shown = shows_all or is_read
            n_hidden += not shown
            place = groups["common options" if spec.name in COMMON and shown else group]
            _add_flag(place, spec, shown)
    hint = f"; it leaves out {n_hidden} that this model or command does not read" * (n_hidden > 0)
    parser.add_argument(
        EVERYTHING, action="help", default=argparse.SUPPRESS, help=f"show every option{hint}"
    )


def _add_flag(place: argparse._ArgumentGroup, spec: dataclasses.Field, shown: bool) -> None:
    limits: Option = spec.metadata["option"]
    extra = f"; {limits.range()}" if limits.range() else ""
    text = f"{limits.meaning} [{show(spec.default)}{extra}]".replace("%", "%%")
    boolean = {"nargs": "?", "const": "true"} if spec.type.startswith("bool") else {}
    metavar = {"int": "N", "float": "X", "bool": "BOOL"}.get(spec.type.split()[0], "TEXT")
    metavar = "LIST" if spec.type.startswith("tuple") else metavar
    text = text if shown else argparse.SUPPRESS
    hidden = {"default": argparse.SUPPRESS}
    place.add_argument(f"--{spec.name}", metavar=metavar, help=text, **hidden, **boolean)
    if boolean:
        off = {"dest": spec.name, "action": "store_const", "const": "false"}
        place.add_argument(f"--no_{spec.name}", help=argparse.SUPPRESS, **off, **hidden)


def _chosen_model(arguments: Sequence[str]) -> str:
    """The model that a command line asks for, by `--model` or by the file of `--config`."""
    words = [part for word in arguments for part in word.split("=", 1)]
    given = dict(pairwise(words))
    model = given.get("--model")
    if model is None:
        with contextlib.suppress(UserError):  # a file that cannot be read is complained of later
            model = read_config(given.get("--config", "config.json")).get("model")
    return str(model).partition("+")[0].partition(":")[0].partition(",")[0]


def parse_flags(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> dict[str, Any]:
    """What was given: options of `Config` as their typed values, others as the parser has them."""
    given = vars(parser.parse_args(arguments))
    return {k: parse_value(k, v) if k in FIELDS else v for k, v in given.items()}


def check_flags(flags: Mapping[str, Any]) -> None:
    """Every option of `Config` is allowed by itself, or a `ConfigError` that names its flag."""
    for key in filter(FIELDS.__contains__, flags):
        try:
            checked_value(key, flags[key])
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None


def listed(key: str, text: str | None, default: Any) -> list[Any]:
    """The values of `--<key>s`, each once; without one the default alone.

    Raises:
        UserError: one is not allowed, or comes twice.
    """
    if text is None:
        return [default]
    found: list[Any] = []
    for part in text.split(","):
        value = parse_value(key, part)
        check_values({key: value}, f"--{key}s")
        if value in found:
            raise UserError(f"--{key}s lists {part} twice; give every value once")
        found.append(value)
    return found


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """`--threads` for a command whose options are not those of a config."""
    limits = FIELDS["threads"].metadata["option"]
    parser.add_argument(
        "--threads",
        metavar="N",
        type=lambda text: checked_value("threads", parse_value("threads", text)),
        default=FIELDS["threads"].default,
        help=f"{limits.meaning} [auto]",
    )
