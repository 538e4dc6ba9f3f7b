"""What the commands share that train several models on one task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import Config, check_values, read_config
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.comparison_folder import ComparisonFolder
from wavelet_lm.experiments.model_names import SYNTAX, model_configs, split_names
from wavelet_lm.models.classifier.model import POOLING


def command_parser(description: str | None, usage: str) -> OneLineParser:
    """The parser of such a command; usage: of its own options."""
    return OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s {usage} --model {SYNTAX}[,…] [--steps N] [--json FILE] [--key value …]"
        " | --resume FOLDER",
    )


def add_shared_flags(parser: argparse.ArgumentParser, steps: str) -> None:
    """The options of every task, then those of the config, `--model` and `--seed` among them.

    Args:
        steps: the default, in words.
    """
    parser.add_argument("--config", metavar="FILE", help="config in place of the paper's")
    parser.add_argument(
        "--steps",
        dest="max_steps",
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"the same as --max_steps [{steps}]",
    )
    parser.add_argument("--pooling", choices=tuple(POOLING), default="last", help="[%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    goes_on = "go on with the models of a folder that this command has made, bit for bit"
    parser.add_argument("--resume", metavar="FOLDER", help=goes_on)
    add_config_flags(parser)


def given(parser: OneLineParser, kind: str) -> tuple[dict[str, Any], ComparisonFolder | None]:
    """The options that were typed; with `--resume` those of a comparison, and its folder.

    Args:
        kind: of the command, as its folders say it.

    Raises:
        UserError: there is no such comparison, or other options are given with it.
    """
    typed = parse_flags(parser, sys.argv[1:])
    path = typed.pop("resume")
    if path is None:
        return typed, None
    folder, alone = ComparisonFolder.open(path, kind), parse_flags(parser, ["--resume", path])
    for key, value in typed.items():
        if key not in alone or value != alone[key]:
            raise UserError(
                f"--resume goes on as the comparison began, and --{key} would make another one;"
                f" drop --{key}"
            )
    options = parse_flags(parser, folder.arguments)
    del options["resume"]
    return options, folder


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def configs_of(
    defaults: Mapping[str, Any], file: str | None, flags: Mapping[str, Any]
) -> dict[str, Config]:
    """The config of each model that the key `model` names, as `model_names` reads them, by name.

    Each has the defaults, changed by the keys of a config file, changed by the flags.

    Raises:
        UserError: a name, a key or a value is not as it should be, or there is no such device.
    """
    given = {} if file is None else read_config(file)
    check_values(given, file or "")
    values = {"model": "wavelet_lm", **defaults, **given, **flags}
    if "block_size" in flags or "+block_size" in values["model"]:
        raise UserError("block_size is the length of the task's longest sequence; leave it away")
    configs = model_configs(split_names(values["model"]), values)
    for config in configs.values():
        resolve_device(config.device)
    return configs
