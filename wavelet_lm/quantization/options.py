"""How a run is to be quantized, where it differs from what its config says."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from wavelet_lm.config import Config, QuantizationConfig
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import is_fused
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.quantization.backends import check_backend
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.text_files import read_text

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
