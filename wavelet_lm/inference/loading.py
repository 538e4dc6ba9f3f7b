"""Models and tokenizers by path, whoever wrote them: this project, or a published checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from wavelet_lm.data import tokenizers
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.models import checkpoint
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.quantization.checkpoint import load_quantized


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> nn.Module:
    """The model of a run folder, a checkpoint file or a published `.pt`, in eval mode on `device`.

    A run folder may be `hf://user/name[@revision]`, one in the hub (`hub_paths.py`).

    Of a quantized checkpoint it is a fused model, which reads and does not train. A published
    checkpoint needs its `config.json` beside it; `log` gets what of it was ignored.

    Raises:
        UserError: there is none, it is truncated, or it does not fit its config.
    """
    # Imported here, since that module is also a command.
    from wavelet_lm.interop.published import is_published, load_published

    if is_published(path):
        return load_published(path, device, log)
    opened = checkpoint.Checkpoint(checkpoint.find_checkpoint(path))
    if opened.quantization is not None:
        return load_quantized(opened, device)
    return checkpoint.load_own_model(path, device)


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> LanguageModel | StoredModel:
    """As `load_model`, for a model to be fused: the weights are left where they are stored.

    Those of a quantized checkpoint are read at once, since its model is a fused one.
    """
    from wavelet_lm.interop.published import is_published, stored_published

    if is_published(path):
        return stored_published(path, device, log)
    opened = checkpoint.Checkpoint(checkpoint.find_checkpoint(path))
    if opened.quantization is not None:
        return load_quantized(opened, device)
    return checkpoint.stored_model(opened, device)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run folder or a checkpoint; GPT-2's for published ones of its vocabulary.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from wavelet_lm.interop.published import (
        is_published,
        published_tokenizer,
        published_vocab_size,
        read_tensors,
    )

    if is_in_hub(path):
        return tokenizers.load_tokenizer(path)
    file = Path(path).expanduser()
    beside = [file.parent / "tokenizer" / "tokenizer.json", file.parent / "tokenizer.json"]
    if not is_published(file) or any(map(Path.is_file, beside)):
        return tokenizers.load_tokenizer(path)
    vocab_size = published_vocab_size(file, read_tensors(file))
    return tokenizers.named_tokenizer(published_tokenizer(file, vocab_size).name)


def find_own_checkpoint(path: str | Path) -> Path:
    """As `find_checkpoint`, for training, which starts from checkpoints of this project alone.

    Raises:
        UserError: there is none, or it is a published one; the line says how to convert that.
    """
    from wavelet_lm.interop.published import is_published

    file = checkpoint.find_checkpoint(path)
    if is_published(file) and file.is_file():
        raise UserError(
            f"{path}: a published checkpoint; start from the run folder that this makes of it:"
            f" python -m wavelet_lm.interop.published {shlex.quote(str(path))} --out RUN"
        )
    return file
