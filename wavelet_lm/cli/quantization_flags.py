"""The `--ptq…` flags, which generation, evaluation and the quantization command share.

`--ptq_mlp_bits` is the config's `quantize_mlp_bits`, and so for all of them: a run's config gives
the defaults, and `quantize_enabled` that of `--ptq8` itself.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from wavelet_lm.quantization.options import FLAGS, QuantizationOptions


def add_quantization_flags(parser: argparse.ArgumentParser, switch: bool = True) -> None:
    """The flags of `QuantizationOptions`; without `switch` all but `--ptq8`."""
    flags = parser.add_argument_group("quantized weights")
    if switch:
        flags.add_argument(
            "--ptq8",
            "--quantize",
            action="store_const",
            const=True,
            help="8-bit weights, or what the flags below say: smaller and faster [the run's]",
        )
        flags.add_argument(
            "--no_ptq8", dest="ptq8", action="store_const", const=False, help=argparse.SUPPRESS
        )
    for flag, field in FLAGS.items():
        limits = field.metadata["option"]
        flags.add_argument(
            f"--{flag}",
            type=type(limits.choices[0]),
            choices=limits.choices,
            help=f"{limits.meaning.replace('quantize_bits', '--ptq_bits')} [the run's]",
        )
    flags.add_argument(
        "--ptq_calibrate",
        metavar="FILE",
        help="a text like those to come; what rounding to 2 or 4 bits costs on it is made up for",
    )


def quantization_options(given: Mapping[str, Any]) -> QuantizationOptions:
    """The options among parsed flags."""
    names = (field.name for field in dataclasses.fields(QuantizationOptions))
    return QuantizationOptions(**{name: given[name] for name in names if name in given})
