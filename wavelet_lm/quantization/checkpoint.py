"""A quantized model on disk: its tensors, and the scheme in the header.

It is read into a model of the same structure that is built without weights, so the model in full
precision never exists. The parts that the structure does not say (a crawl's taps, which channels a
bag keeps) are buffers, and are kept as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.fusion.linear import cast, computing_dtype
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.checkpoint import QUANTIZED_FORMAT, Checkpoint, write_tensors
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_quantized(
    path: str | Path, model: LanguageModel, scheme: Scheme, metadata: dict[str, Any]
) -> None:
    """Write what `quantize` made, atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file is kept.
    """
    tensors = {
        name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in _tensors(model)
    }
    header = {
        "format": QUANTIZED_FORMAT,
        "quantization": scheme.to_json(),
        "config": json.dumps(model.config.to_dict()),
        "vocab_size": str(model.vocab_size),
        "metadata": json.dumps(metadata),
    }
    write_tensors(path, tensors, header)


def load_quantized(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> LanguageModel:
    """The model of a quantized checkpoint, in eval mode on `device`.

    Raises:
        UserError: the scheme is one that this version does not know, or the tensors do not fit.
    """
    scheme = Scheme.from_json(checkpoint.quantization, str(checkpoint.path))
    config = checkpoint.config
    empty = checkpoint.without_weights()
    with torch.device("meta"):
        model = quantize(empty, scheme, adapt=config.fwpkm_inference_updates)
    needed = dict(_tensors(model))
    problems = [f"no {name}" for name in sorted(needed.keys() - checkpoint.names)]
    problems += [f"unknown {name}" for name in sorted(checkpoint.names - needed.keys())]
    loaded: dict[int, Tensor] = {}
    for name in needed.keys() & checkpoint.names:
        tensor = checkpoint.tensor(name)
        if tensor.shape != needed[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, not {list(needed[name].shape)}")
        elif not _may_be(tensor.dtype, needed[name].dtype):
            problems.append(f"{name} is {tensor.dtype}, not {needed[name].dtype}")
        # Cloned where it stays on the CPU, since what safetensors returns is a view of the file.
        on_device = tensor.to(device)
        loaded[id(needed[name])] = on_device.clone() if on_device is tensor else on_device
    if problems:
        raise UserError(f"{checkpoint.path}: a checkpoint of another config: {problems[0]}")
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(loaded[id(p)], requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = loaded[id(buffer)]
    return cast(model, computing_dtype(model))


def _may_be(given: torch.dtype, needed: torch.dtype) -> bool:
    """Whether a tensor may have this type: codes have one, floats any precision."""
    return given == needed or (needed.is_floating_point and given in FLOATS)


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, shared ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
