"""From options to a `Writer`: models and tokenizers, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wavelet_lm.allocator import returning_memory
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import n_bytes
from wavelet_lm.inference.completion import Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import check_vocabulary
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.inference.loading import load_tokenizer, open_model
from wavelet_lm.inference.state_file import Fingerprint, ModelRecord
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.checkpoint import check_finite, check_values, find_checkpoint
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.quantization.options import QuantizationOptions
from wavelet_lm.quantization.quantize import quantize


def open_writer(
    options: GenerationOptions, device: torch.device, log: Callable[[str], object]
) -> Writer:
    """The checkpoint's model, and the draft's, ready to write as the options say.

    Raises:
        UserError: a checkpoint is missing, damaged, has no tokenizer or weights that are not
            finite; the draft's tokenizer is another one; options that the model cannot follow.
    """
    with returning_memory():
        return _open_writer(options, device, log)


def _open_writer(
    options: GenerationOptions, device: torch.device, log: Callable[[str], object]
) -> Writer:
    opened = open_checkpoint(options.checkpoint, device, log)
    empty, tokenizer = opened.empty, opened.tokenizer
    strategy = options.strategy(empty.config)
    how = options.decoding(empty.config, device)
    adapts = options.adapts(empty.config)
    scheme = options.quantization.scheme(empty, options.checkpoint)
    if scheme is None:
        decoder = Decoder(opened.model, **how, adapt=adapts)
        record = opened.record()
    else:
        quantized = quantize(
            opened.model,
            scheme,
            # The decoder casts; a library's layers are made for the dtype that they are to read.
            dtype=None if scheme.backend == "native" else how["dtype"],
            adapt=adapts,
            calibration=options.quantization.calibration(empty.config, tokenizer),
            progress=lambda stage: log(f"calibrating {stage}"),
        )
        log(f"{scheme.describe()}: {n_bytes(quantized) / 1e6:,.2f} MB")
        record = ModelRecord.of(quantized)
        decoder = Decoder(quantized, **how, adapt=adapts)
    draft = None
    if options.draft is not None:
        other = open_checkpoint(options.draft, device, log)
        if other.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{options.draft}: its tokenizer ({other.tokenizer.name}) is not that of"
                f" {options.checkpoint} ({tokenizer.name}); a draft needs the very same one"
            )
        scheme, draft_model = QuantizationOptions().scheme(other.empty, options.draft), other.model
        if scheme is not None:
            draft_model = quantize(draft_model, scheme, dtype=how["dtype"])
        draft = Decoder(draft_model, **how, adapt=False)
    auto = options.compile == "auto"
    return Writer(decoder, record, tokenizer, strategy, draft, auto_compile=auto, log=log)


class OpenedCheckpoint:
    """A checkpoint whose weights are looked at as they are read.

    Attributes:
        model: to be fused; `empty` is that model with or without weights.
    """

    def __init__(self, model: LanguageModel | StoredModel, tokenizer: Tokenizer, path: Path):
        self.model, self.tokenizer = model, tokenizer
        self._fingerprint = fingerprint = Fingerprint()
        if not isinstance(model, StoredModel):
            self.empty = model
            check_finite(model, path)
            return

        def see(name: str, values: Tensor) -> None:  # not a method: the samples go with `self`
            check_values(name, values, path)
            fingerprint.add(name, values)

        self.empty, model.see = model.model, see

    def record(self) -> ModelRecord:
        """What stays of the model once it is fused."""
        if not isinstance(self.model, StoredModel):
            return ModelRecord.of(self.model)
        fingerprint = self._fingerprint.of(self.empty)
        return ModelRecord(self.empty.config, self.empty.vocab_size, fingerprint)


def open_checkpoint(
    path: str, device: torch.device, log: Callable[[str], object]
) -> OpenedCheckpoint:
    """The model and the tokenizer of a run folder or a checkpoint.

    Raises:
        UserError: it is missing, damaged, has no tokenizer or another model's.
    """
    checkpoint = find_checkpoint(path)
    model, tokenizer = open_model(checkpoint, device, log), load_tokenizer(path)
    opened = OpenedCheckpoint(model, tokenizer, checkpoint)
    try:
        check_vocabulary(opened.empty, tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return opened
