"""The products of a fused model, and how its modules are rebuilt."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from fractions import Fraction
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from wavelet_lm.kernels.step_matmul import (
    batched_matmul,
    is_step,
    is_tiled,
    step_linear,
    step_matmul,
)
from wavelet_lm.roles import Runs


class FusedLinear(nn.Linear):
    """A linear layer of a fused model."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> FusedLinear:
        """The layer of these weights, [out, in] and [out]."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight, layer.bias = as_parameter(weight), as_parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], dtype kept."""
        return _linear(x, self.weight, self.bias)


class BatchedLinear(nn.Module):
    """n products at once: x [n, ..., T, in] -> [n, ..., T, out], with a weight [n, out, in].

    T are positions of one text: in a step of one position each, rows are texts (`step_matmul.py`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = as_parameter(weight), as_parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, ..., T, in] -> [n, ..., T, out], dtype kept."""
        rows = x.reshape(len(x), -1, x.shape[-1])  # dearer: `flatten`, and `unflatten` below
        if self.bias is not None and bias_apart(x):
            y = torch.bmm(rows, self.weight.mT) + self.bias[:, None]
        else:
            product = step_matmul if is_tiled(x) and is_step(x) else batched_matmul
            y = product(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], -1)

    def one(self, i: int, x: Tensor) -> Tensor:
        """The i-th product alone: [..., T, in] -> [..., T, out]."""
        return _linear(x, self.weight[i], None if self.bias is None else self.bias[i])


class OneOfBatch(nn.Module):
    """One product of a `BatchedLinear`, whose weights it shares."""

    def __init__(self, batch: BatchedLinear, i: int):
        super().__init__()
        self.batch, self.i = batch, i
        self.share = Fraction(1, len(batch.weight))

    def runs(self) -> dict[nn.Module, Runs]:
        """Of the batch one product runs."""
        return {self.batch: Runs(self.share, self.share)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, in] -> [..., T, out], dtype kept."""
        return self.batch.one(self.i, x)


def dense(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight [out, in] and bias [out] of a layer that is just these, contiguous; else None."""
    weight = bias = None
    if type(layer) is FusedLinear:
        weight, bias = layer.weight, layer.bias
    elif type(layer) is OneOfBatch and type(layer.batch) is BatchedLinear:
        weight, bias = layer.batch.weight[layer.i], layer.batch.bias[layer.i]
    if weight is None or bias is None or not weight.is_contiguous():
        return None
    return weight, bias


def as_parameter(x: Tensor | None) -> nn.Parameter | None:
    """x of any shape as a parameter, which it may be already: then a shared one stays shared."""
    if x is None or isinstance(x, nn.Parameter):
        return x
    return nn.Parameter(x, requires_grad=False)


def bias_apart(x: Tensor) -> bool:
    """Whether a product of x, of any shape, leaves its bias to a sum of its own.

    For one text on a GPU the compiler turns a product into a reduction, a kernel of its own that
    also does what stands around it, but not a product with a bias inside.
    """
    return x.is_cuda and torch.compiler.is_compiling()


def steps_in_one_launch(x: Tensor) -> bool:
    """Whether x [B, T, C] is a position of one text, compiled for a GPU and not in float64."""
    is_one = x.is_cuda and x.shape[:2] == (1, 1) and x.dtype != torch.float64
    return torch.compiler.is_compiling() and is_one


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., T, in] -> [..., T, out]."""
    if bias is not None and bias_apart(x):
        return linear(x, weight) + bias
    if is_tiled(x) and is_step(x):
        return step_linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return linear(x, weight, bias)


Leaf = Callable[[nn.Module, str], nn.Module | None]
Memo = MutableMapping[nn.Module, nn.Module]


def rebuilt(module: nn.Module, leaf: Leaf, name: str = "", memo: Memo | None = None) -> nn.Module:
    """A new tree of modules, in which `leaf(module, name)` takes the place of what it accepts.

    What stands in several places stays one module; parameters and buffers are shared.
    """
    memo = {} if memo is None else memo
    if module in memo:
        return memo[module]
    new = leaf(module, name)
    if new is None:
        new = shallow_copy(module)
        for part, child in module._modules.items():
            if child is not None:
                path = f"{name}.{part}" if name else part
                new._modules[part] = rebuilt(child, leaf, path, memo)
    memo[module] = new
    return new


class Cast:
    """Modules in another dtype, part by part, their linear layers as `FusedLinear`.

    What parts share stays shared: weights, modules, and what was cast before. Modules with
    `keeps_dtype` do keep theirs: single learned factors (a 0-d tensor does not raise the dtype of
    what it multiplies) and quantized weights, whose tables are told which dtype to answer in
    (`output_dtype`).
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        # Weak, since a part whose weights have been read lets them go.
        self._modules: Memo = WeakKeyDictionary()
        self._parameters = WeakTensorKeyDictionary()

    def __call__(self, module: nn.Module) -> nn.Module:
        """The module in the other dtype; itself, if this is what it came from."""
        new = rebuilt(module, _fused_linear, memo=self._modules)
        for part in new.modules():
            if self._modules.get(part) is not part:
                self._modules[part] = part
                self._cast(part)
        return new

    def _cast(self, module: nn.Module) -> None:
        if hasattr(module, "output_dtype"):
            module.output_dtype = self.dtype
        kept = getattr(module, "keeps_dtype", False)
        for name, p in module._parameters.items():
            if p is None:
                continue
            if p not in self._parameters:
                value = p.detach() if kept else p.detach().to(self.dtype)
                new = nn.Parameter(value, requires_grad=False)
                self._parameters[p] = self._parameters[new] = new
            module._parameters[name] = self._parameters[p]


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The whole model in another dtype (`Cast`)."""
    return Cast(dtype)(model)


def _fused_linear(module: nn.Module, _: str) -> nn.Module | None:
    return FusedLinear.of(module.weight, module.bias) if type(module) is nn.Linear else None


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's vectors, which is that of its products."""
    return next(
        p.dtype
        for module in model.modules()
        if not getattr(module, "keeps_dtype", False)
        for p in module.parameters(recurse=False)
    )


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parts, which can be replaced without changing the original.

    Nor does a hook on the one see the other.
    """
    new = copy.copy(module)
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    new._buffers = dict(module._buffers)
    new._forward_hooks, new._forward_pre_hooks = OrderedDict(), OrderedDict()
    return new
