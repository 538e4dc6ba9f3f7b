"""The `--ptq…` flags, which generation, evaluation and the quantization command share.

`--ptq_mlp_bits` is the config's `quantize_mlp_bits`, and so for all of them: a run's config gives
the defaults, and `quantize_enabled` that of `--ptq8` itself.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.config import Config, QuantizationConfig
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import is_fused
from wavelet_lm.inference.text.prompts import read_text
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.quantization.backends import check_backend
from wavelet_lm.quantization.scheme import Scheme

# Windows of a calibration text that are read, evenly spaced.
CALIBRATION_WINDOWS = 128
# Flag -> config key.
FLAGS = {
    field.name.replace("quantize", "ptq"): field
    for field in dataclasses.fields(QuantizationConfig)
    if field.name != "quantize_enabled"
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """What was typed; None: not given, and the run's config decides."""

    ptq8: bool | None = None
    ptq_backend: str | None = None
    ptq_bits: int | None = None
    ptq_mixer_coarse_bits: int | None = None
    ptq_mixer_mid_bits: int | None = None
    ptq_mixer_fine_bits: int | None = None
    ptq_mlp_bits: int | None = None
    ptq_lifting_bits: int | None = None
    ptq_embedding_bits: int | None = None
    ptq_group_size: int | None = None
    ptq_calibrate: str | None = None

    def scheme(self, model: LanguageModel, source: str) -> Scheme | None:
        """How `model`, of the checkpoint `source`, is to be quantized; None: not at all.

        Raises:
            UserError: a flag without `--ptq8`, or for a model that is quantized already; a value
                or backend that cannot be had.
        """
        given = [name for name in (*FLAGS, "ptq_calibrate") if getattr(self, name) is not None]
        config = model.config
        if is_fused(model):
            if self.ptq8 or given:
                flag = given[0] if given else "ptq8"
                raise UserError(
                    f"{source} is quantized already; leave out --{flag}, or give the run that it"
                    " was made from"
                )
            return None
        if not (config.quantize_enabled if self.ptq8 is None else self.ptq8):
            if given:
                raise UserError(f"--{given[0]} is a part of --ptq8; give that too")
            return None
        values = {
            field.name: getattr(self, flag)
            for flag, field in FLAGS.items()
            if getattr(self, flag) is not None
        }
        scheme = Scheme.of(config.replace(**values), self.ptq_calibrate is not None)
        if min(scheme.bits.values()) == 16:
            raise UserError("16 bits for all weights leave nothing to quantize; give some fewer")
        if scheme.calibrated and min(scheme.bits.values()) >= 8:
            raise UserError(
                "--ptq_calibrate is for weights of 2 or 4 bits, and there are none; leave it out or"
                " give some fewer bits, such as --ptq_mlp_bits 4"
            )
        check_backend(scheme)
        return scheme

    def calibration(self, config: Config, tokenizer: Tokenizer) -> Tensor | None:
        """Windows [n, block_size] of the calibration text, None where none was given.

        Raises:
            UserError: the text cannot be read, or is shorter than one window.
        """
        if self.ptq_calibrate is None:
            return None
        tokens = torch.tensor(tokenizer.encode(read_text(self.ptq_calibrate)))
        size = config.block_size
        if len(tokens) < size:
            raise UserError(
                f"{self.ptq_calibrate} has {len(tokens)} tokens; calibrating needs"
                f" {size} (block_size) at least, and {CALIBRATION_WINDOWS} times that to do it well"
            )
        n = min(CALIBRATION_WINDOWS, len(tokens) // size)
        starts = torch.linspace(0, len(tokens) - size, n).long()
        return tokens[starts[:, None] + torch.arange(size)]


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
