"""From options to a `Writer`: models and tokenizers, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.inference.completion import Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import check_vocabulary
from wavelet_lm.inference.loading import load_model, load_tokenizer
from wavelet_lm.inference.options import GenerationOptions
from wavelet_lm.inference.prepared import n_bytes
from wavelet_lm.inference.quantization.options import QuantizationOptions
from wavelet_lm.inference.quantization.quantize import quantize
from wavelet_lm.models.checkpoint import check_finite, find_checkpoint


def open_writer(
    options: GenerationOptions, device: torch.device, log: Callable[[str], object]
) -> Writer:
    """The checkpoint's model, and the draft's, ready to write as the options say.

    Raises:
        UserError: a checkpoint is missing, damaged, has no tokenizer or weights that are not
            finite; the draft's tokenizer is another one; options that the model cannot follow.
    """
    model, tokenizer = _load(options.checkpoint, device, log)
    strategy = options.strategy(model.config)
    how = options.decoding(model.config, device)
    adapts = options.adapts(model.config)
    scheme = options.quantization.scheme(model, options.checkpoint)
    if scheme is not None:
        model = quantize(
            model,
            scheme,
            # The decoder casts; a library's layers are made for the dtype that they are to read.
            dtype=None if scheme.backend == "native" else how["dtype"],
            adapt=adapts,
            calibration=options.quantization.calibration(model.config, tokenizer),
            progress=lambda stage: log(f"calibrating {stage}"),
        )
        log(f"{scheme.describe()}: {n_bytes(model) / 1e6:,.2f} MB")
    decoder = Decoder(model, **how, adapt=adapts)
    draft = None
    if options.draft is not None:
        draft_model, draft_tokenizer = _load(options.draft, device, log)
        if draft_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{options.draft}: its tokenizer ({draft_tokenizer.name}) is not that of"
                f" {options.checkpoint} ({tokenizer.name}); a draft needs the very same one"
            )
        scheme = QuantizationOptions().scheme(draft_model, options.draft)
        if scheme is not None:
            draft_model = quantize(draft_model, scheme, dtype=how["dtype"])
        draft = Decoder(draft_model, **how, adapt=False)
    auto = options.compile == "auto"
    return Writer(decoder, model, tokenizer, strategy, draft, auto_compile=auto, log=log)


def _load(
    path: str, device: torch.device, log: Callable[[str], object]
) -> tuple[nn.Module, Tokenizer]:
    checkpoint = find_checkpoint(path)
    model = load_model(checkpoint, device, log)
    check_finite(model, checkpoint)
    tokenizer = load_tokenizer(path)
    try:
        check_vocabulary(model, tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model, tokenizer
