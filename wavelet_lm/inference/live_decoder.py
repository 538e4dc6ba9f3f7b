"""Decoders that follow the weights of their models."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.base import LanguageModel

# Values of a tensor that are looked at to see whether it has changed.
N_SAMPLES = 16


class LiveDecoder:
    """A decoder that follows its model as long as that is there."""

    def __init__(self, model: Any, **how: Any):
        self._how, self._lock = how, threading.Lock()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._stamp: tuple | None = None
        if isinstance(model, LanguageModel):
            self._model, self._stamp = weakref.ref(model), weights_stamp(model)
        self._decoder = Decoder(model, **how)

    def current(self) -> tuple[nn.Module, Decoder]:
        """The decoder of the weights as they are now, and its own model."""
        model = self._model()
        with self._lock:
            if model is not None:
                stamp = weights_stamp(model)
                if stamp != self._stamp:
                    self._decoder, self._stamp = Decoder(model, **self._how), stamp
            return self._decoder.model, self._decoder


def weights_stamp(model: LanguageModel) -> tuple:
    """What differs where a model's weights, or the switches by which it reads, have changed.

    PyTorch counts the changes of a tensor, but not those through `.data` or by kernels of other
    libraries, so that some values of every tensor are looked at as well.
    """
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t is not None]
    places = [(t.data_ptr(), t.shape, t.dtype, _version(t)) for t in tensors]
    samples = [_sample(t) for t in tensors]
    values = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
    return model.config, places, values


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // N_SAMPLES))].double()


_DECODERS: weakref.WeakKeyDictionary[nn.Module, LiveDecoder] = weakref.WeakKeyDictionary()
_DECODERS_LOCK = threading.Lock()


def live_decoder_of(model: nn.Module) -> LiveDecoder:
    """The model's decoder for `generate`, kept as long as the model is."""
    if not isinstance(model, LanguageModel):  # read as it is: nothing is fused
        return LiveDecoder(model, context="auto")
    with _DECODERS_LOCK:
        if model not in _DECODERS:
            _DECODERS[model] = LiveDecoder(model, context="auto")
        return _DECODERS[model]
