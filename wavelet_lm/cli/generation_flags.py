"""The command line of `generate.py`, from the declarations of its options."""

from __future__ import annotations

import argparse
import dataclasses

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.config import show
from wavelet_lm.inference.declarations import FLAGS, Flag
from wavelet_lm.inference.generation_options import GenerationOptions

EPILOG = """\
Text goes to standard output, all else to standard error. Options of which "the run's" is said come
from the config of the run when they are not given. --no_metrics turns off what --strategies or the
run turns on, and so for entropy_adaptive, clean_spacing and fwpkm_inference_updates."""


def parse_options(description: str, arguments: list[str] | None = None) -> GenerationOptions:
    """The options of a command line, sys.argv's if none is given.

    Raises:
        UserError: one line for anything that is wrong with them.
    """
    given = vars(build_parser(description).parse_args(arguments))
    quantization = quantization_options(given)
    given = {k: v for k, v in given.items() if not hasattr(quantization, k)}
    given["stop"] = tuple(given["stop"] or ())
    return GenerationOptions(**given, quantization=quantization)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `generate`; `description` heads its help."""
    parser = OneLineParser(
        run="run folder, checkpoint file, or hf://user/name",
        description=description,
        epilog=EPILOG,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in dataclasses.fields(GenerationOptions):
        if spec.name == "quantization":
            add_quantization_flags(parser)
        elif spec.name in FLAGS:
            title = FLAGS[spec.name].group
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add_flag(groups[title], spec, FLAGS[spec.name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, spec: dataclasses.Field, flag: Flag) -> None:
    name, kind, default = spec.name, spec.type.removesuffix(" | None"), spec.default
    words = _words(flag, default)
    if kind == "int | str":
        add_threads_flag(group)
    elif kind == "bool" and default is None:  # --NAME and --no_NAME, and None for neither
        group.add_argument(f"--{name}", action="store_const", const=True, help=words)
        group.add_argument(
            f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
        )
    elif kind == "bool":
        group.add_argument(f"--{name}", action="store_true", help=words)
    elif kind.startswith("tuple"):
        group.add_argument(f"--{name}", metavar=flag.metavar, action="append", help=words)
    else:
        number = {"int": (int, "N"), "float": (float, "X")}.get(kind)
        python_type, metavar = number or (str, flag.metavar)
        group.add_argument(
            f"--{name}", metavar=metavar, type=python_type, default=default, help=words
        )


def _words(flag: Flag, default: object) -> str:
    """The line of the help: the meaning, and in brackets what holds where nothing is given."""
    holds = default if flag.otherwise is None else flag.otherwise
    says_nothing = holds is None or holds is False or holds == ()
    return flag.meaning if says_nothing else f"{flag.meaning} [{show(holds)}]"
