"""Weights that stay in their file until a part of the model is at work on them.

A model of 2 GB need not be in memory beside what is made of it: it is built without weights, and
each part gets its own for as long as it is read.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.language_model import LanguageModel
from wavelet_lm.models.registry import MOST_TENSORS, REGISTRATIONS_PER_TENSOR, build_model

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorReader:
    """The weights in a safetensors file, each read into memory of its own.

    The library maps the file instead, and what was read of it counts as this process's memory until
    it is closed. It has found the file whole, and the names, shapes and types right, before.
    """

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(n))
        self._start = 8 + n

    def __call__(self, name: str) -> Tensor:
        """The tensor of this name, on the CPU."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                n = file.readinto(view[done:])
                if not n:
                    raise UserError(f"{self._path}: was cut short while it was read; try again")
                done += n
        return data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


class StoredModel:
    """A model without weights, and where those of its parts come from.

    Args:
        config, vocab_size: what it is built from.
        read: from the name of a parameter to its values, on any device and in any dtype.
        device: where the weights go.
        dtype: of the weights.
        most: values that a tensor may have.
        n_tensors: those that the weights should be; building stops where there are far more, which
            sizes that loop without end would reach.

    Raises:
        UserError: no such model can be built.

    Attributes:
        model: in eval mode; its parameters are on the meta device, its buffers are not.
        see: gets every parameter's name and values, once, when they are first read.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        read: Callable[[str], Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        most: float = math.inf,
        n_tensors: int = MOST_TENSORS,
    ):
        try:
            with torch.device(device), _NoDraws(most), _dropped_weights(n_tensors):
                self.model: LanguageModel = build_model(config, vocab_size)
        except (ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"no model of these sizes can be built ({reason})") from None
        self.model.to(dtype).eval()
        self.device = torch.device(device)
        self.see: Callable[[str, Tensor], object] = lambda name, values: None
        self.read, self.dtype = read, dtype
        self._seen = set[str]()
        self._names = {id(p): name for name, p in self.model.named_parameters()}

    @contextmanager
    def at_hand(self, *parts: nn.Module) -> Iterator[None]:
        """These parts of the model have their weights inside."""
        places = [
            (module, key, parameter)
            for part in parts
            for module in part.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        real: dict[int, nn.Parameter] = {}
        for module, key, empty in places:
            if id(empty) not in real:
                real[id(empty)] = self._parameter(empty)
            module._parameters[key] = real[id(empty)]
        del real
        try:
            yield
        finally:
            for module, key, empty in places:
                module._parameters[key] = empty

    def loaded(self) -> LanguageModel:
        """The model with all of its weights, which are its own from now on."""
        real: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for key, empty in module._parameters.items():
                if empty is not None and id(empty) not in real:
                    real[id(empty)] = self._parameter(empty)
                if empty is not None:
                    module._parameters[key] = real[id(empty)]
        return self.model

    def _parameter(self, empty: nn.Parameter) -> nn.Parameter:
        name = self._names[id(empty)]
        values = self.read(name).to(self.device, empty.dtype)
        if name not in self._seen:
            self._seen.add(name)
            self.see(name, values)
        return nn.Parameter(values, requires_grad=empty.requires_grad)


class _NoDraws(TorchFunctionMode):
    """Inside, initial values are not drawn, which takes time, and memory is not touched for them.

    (On the meta device that would be so by itself, but its arithmetic loads PyTorch's reference
    implementations, 900 modules that take a second or two and 160 MB; and buffers need values.)

    most: a tensor of more values is refused.
    """

    IN_PLACE = frozenset(
        (
            Tensor.normal_,
            Tensor.uniform_,
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.kaiming_uniform_,
            nn.init.trunc_normal_,
        )
    )

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.IN_PLACE:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.zeros  # which the system gives without touching them
        if func is torch.eye and args[0] ** 2 > self.most:
            raise self._too_large([args[0]] * 2)
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.numel() > self.most:
            raise self._too_large(list(made.shape))
        return made

    @staticmethod
    def _too_large(shape: list[int]) -> ValueError:
        return ValueError(f"a tensor of {shape} is larger than all of the file")


@contextmanager
def _dropped_weights(n_tensors: int) -> Iterator[None]:
    """Modules that this thread builds inside have their parameters on the meta device."""
    thread, left = threading.get_ident(), REGISTRATIONS_PER_TENSOR * (n_tensors + 1)

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal left
        if threading.get_ident() != thread:
            return None
        left -= 1
        if left < 0:
            raise ValueError(f"it has far more than {n_tensors:,} tensors")
        if parameter is None or parameter.is_meta:
            return None
        empty = torch.empty_like(parameter, device="meta")
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()
