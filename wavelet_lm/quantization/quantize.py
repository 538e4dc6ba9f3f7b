"""From a trained model to a fused one whose matrices are quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wavelet_lm.fusion.fuse import COMPONENTS, fuse
from wavelet_lm.fusion.linear import (
    BatchedLinear,
    FusedLinear,
    OneOfBatch,
    cast,
    computing_dtype,
)
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.models.wavelet_lm.memory import SubKeys, ValueTable
from wavelet_lm.quantization.backends import backend_layer
from wavelet_lm.quantization.gptq import InputMoments, quantize_compensated
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.quantization.weights import (
    QuantizedBatchedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSubKeys,
    QuantizedValueTable,
    QuantizedWeight,
    quantize_weight,
)
from wavelet_lm.roles import component_of

# Components of the modules (`wavelet_lm/roles.py`) that a scheme has other names for.
OF_ROLES = {"wavelet nets": "lifting", "MLP": "mlp"}
MATRICES = (FusedLinear, BatchedLinear)
TABLES = (nn.Embedding, SubKeys, ValueTable)
# Windows of a calibration text that are read at once.
CALIBRATION_BATCH = 8


@torch.no_grad()
def quantize(
    model: LanguageModel | StoredModel,
    scheme: Scheme,
    *,
    dtype: torch.dtype | None = None,
    adapt: bool = False,
    calibration: Tensor | None = None,
    progress: Callable[[str], object] = lambda stage: None,
) -> LanguageModel:
    """The fused model of `model` with weights as the scheme says; vectors and norms stay.

    It is fused first (`fuse.py`), so that what is rounded is what is read: a mixer's
    matrix, near the identity when it starts, has entries of one size in the Hadamard domain.

    Args:
        dtype: of what is not quantized, and of the computation; None keeps the model's.
        adapt: the fast weights will learn.
        calibration: [n, T] tokens, which weights below 8 bits are compensated on; else None.
        progress: called with the name of each part that is calibrated.
    """
    fused = fuse(model, adapt=adapt, precision=scheme.precision)
    dtype = dtype or computing_dtype(fused)
    quantizer = _Quantizer(fused, scheme, dtype)
    if calibration is not None:
        for stage, names in _stages(fused, quantizer.compensable()):
            progress(stage)
            quantizer.replace(names, _input_moments(fused, names, calibration))
    quantizer.replace(quantizer.names())
    return cast(fused, dtype)


class _Quantizer:
    """Replaces the matrices and tables of a fused model, wherever one stands."""

    def __init__(self, model: LanguageModel, scheme: Scheme, dtype: torch.dtype):
        self.model, self.scheme, self.dtype = model, scheme, dtype
        self.bits = {
            name: scheme.bits[scheme_component(model, name)]
            for name, module in model.named_modules()
            if isinstance(module, (*MATRICES, *TABLES))
        }
        self.weights: dict[int, QuantizedWeight] = {}  # by the id of the parameter: ties stay

    def names(self) -> list[str]:
        """What is to be quantized and is not yet."""
        left = (name for name, bits in self.bits.items() if bits < 16)
        return [n for n in left if isinstance(self.model.get_submodule(n), (*MATRICES, *TABLES))]

    def compensable(self) -> list[str]:
        """Matrices of which the rounding can be compensated for."""
        modules = {name: self.model.get_submodule(name) for name in self.names()}
        tables = {id(m.weight) for m in modules.values() if isinstance(m, TABLES)}
        return [
            name
            for name, m in modules.items()
            if isinstance(m, MATRICES) and self.bits[name] < 8 and id(m.weight) not in tables
        ]

    def replace(self, names: Sequence[str], moments: dict[str, InputMoments] | None = None) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in self.model.modules():
            for key, child in parent._modules.items():
                places.setdefault(id(child), []).append((parent, key))
        for name in names:
            module = self.model.get_submodule(name)
            new = self.quantized(module, self.bits[name], (moments or {}).get(name))
            for parent, key in places[id(module)]:
                parent._modules[key] = new

    def quantized(self, module: nn.Module, bits: int, moments: InputMoments | None) -> nn.Module:
        if isinstance(module, MATRICES) and self.scheme.backend != "native":
            return backend_layer(self.scheme.backend, module, bits, self.dtype)
        weight = self.weight(module.weight, bits, moments)
        if isinstance(module, BatchedLinear):
            return QuantizedBatchedLinear(weight, module.bias)
        if isinstance(module, FusedLinear):
            return QuantizedLinear(weight, module.bias)
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(weight, self.dtype)
        if isinstance(module, SubKeys):
            return QuantizedSubKeys(weight)
        return QuantizedValueTable(weight, self.dtype, module.roles["weight"])

    def weight(
        self, weight: nn.Parameter, bits: int, moments: InputMoments | None
    ) -> QuantizedWeight:
        if id(weight) not in self.weights:
            matrices = weight if weight.ndim == 3 else weight[None]
            size = self.scheme.group_size
            if moments is None or not moments.blocks:  # never read, or not asked for
                new = quantize_weight(matrices, bits, size)
            else:
                new = quantize_compensated(matrices, bits, size, moments)
            self.weights[id(weight)] = new
        return self.weights[id(weight)]


def scheme_component(model: LanguageModel, name: str) -> str:
    """Which of `COMPONENTS` a matrix or table of a fused model belongs to.

    What shares a weight with a table (a tied head) goes with the table.
    """
    weight = model.get_submodule(name).weight
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    if any(table.weight is weight for table in tables):
        return "embedding"
    declared = component_of(model, name) or "rest"
    declared = OF_ROLES.get(declared, declared)
    return declared if declared in COMPONENTS else "rest"


def _stages(model: LanguageModel, names: list[str]) -> list[tuple[str, list[str]]]:
    """The matrices in the order in which a text passes them: lifting, block by block, the head."""
    blocks = {part for network in model.networks() for part in network.blocks}
    of_blocks = [name for name, part in model.named_modules() if part in blocks]
    stages: dict[str, list[str]] = {}
    for name in names:
        stage = next((block for block in of_blocks if name.startswith(f"{block}.")), "head")
        if scheme_component(model, name) == "lifting":
            stage = "lifting"
        stages.setdefault(stage, []).append(name)
    return list(stages.items())


def _input_moments(
    model: LanguageModel, names: list[str], calibration: Tensor
) -> dict[str, InputMoments]:
    """What these matrices read when the model reads the calibration windows."""
    moments: dict[str, InputMoments] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        n = len(module.weight) if isinstance(module, BatchedLinear) else 1
        moments[name] = InputMoments(n)
        hooks.append(module.register_forward_pre_hook(_adding(moments[name])))
        for part in model.modules():
            if isinstance(part, OneOfBatch) and part.batch is module:
                hooks.append(part.register_forward_pre_hook(_adding(moments[name], part.i)))
    try:
        for idx in calibration.split(CALIBRATION_BATCH):
            model(idx.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _adding(moments: InputMoments, i: int | None = None) -> Callable[..., None]:
    """A hook that adds a module's input, of the i-th matrix alone or of all."""

    def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        if i is None and isinstance(module, BatchedLinear):
            moments.add(x.flatten(1, -2))
        else:
            moments.add(x.reshape(1, -1, x.shape[-1]), i or 0)

    return add
