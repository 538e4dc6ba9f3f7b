"""Other libraries' products with quantized weights: torchao's and bitsandbytes'.

Each matrix becomes a linear layer of the library, quantized by it and called as its users do:

    bitsandbytes  8 bits  Linear8bitLt, LLM.int8 without outliers: a scale per row of the weights,
                          and of the inputs, which are rounded too
                  4 bits  Linear4bit with NF4, a scale for 64 weights, itself in 8 bits
    torchao       8 bits  Int8WeightOnlyConfig: a scale per row

Biases, embeddings, sub-keys and value tables stay what they are in the native backend.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.fusion.linear import BatchedLinear, FusedLinear
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.quantization.weights import QuantizedBatchedLinear, QuantizedLinear
from wavelet_lm.quiet_imports import quiet_imports

# torchao's 4 bits need a further package (mslk), or a GPU alone in a format of its own.
OFFERED_BITS = {"bitsandbytes": (4, 8, 16), "torchao": (8, 16)}
EXTRAS = {"bitsandbytes": "cuda", "torchao": "quant"}


def check_backend(scheme: Scheme) -> None:
    """Refuse what the library of a scheme does not offer.

    Raises:
        UserError: it has no weights of these bits, does not calibrate, or is not installed.
    """
    backend = scheme.backend
    if backend == "native":
        return
    if scheme.calibrated:
        raise UserError(
            f"--ptq_backend {backend} rounds without a calibration text; leave --ptq_calibrate out,"
            " or take the native backend"
        )
    offered = OFFERED_BITS[backend]
    for component, bits in scheme.bits.items():
        if bits not in offered and component != "embedding":  # which is native in every backend
            raise UserError(
                f"--ptq_backend {backend} has no weights of {bits} bits ({component}); choose among"
                f" {', '.join(map(str, offered))}, or take the native backend"
            )
    _library(backend)


def backend_layer(
    backend: str, module: FusedLinear | BatchedLinear, bits: int, dtype: torch.dtype
) -> nn.Module:
    """The same products with weights quantized by a library, on the device of the weights.

    Args:
        backend: bitsandbytes or torchao.
        module: with weights [out, in], or [n, out, in], which become n layers of the library.
        bits: one of `OFFERED_BITS`, below 16.
        dtype: float32 or bfloat16, which the products are computed in where the library asks.

    Raises:
        UserError: the library is not installed.
    """
    make = {
        ("bitsandbytes", 8): _int8_bitsandbytes,
        ("bitsandbytes", 4): _nf4_bitsandbytes,
        ("torchao", 8): _int8_torchao,
    }[backend, bits]
    library = _library(backend)
    weight = module.weight.detach()
    is_batch = isinstance(module, BatchedLinear)
    layers = [make(library, W, dtype) for W in (weight if is_batch else weight[None])]
    replacement = QuantizedBatchedLinear if is_batch else QuantizedLinear
    return replacement(LibraryWeight(layers), module.bias)


class LibraryWeight(nn.Module):
    """Linear layers of a library in the place of a `QuantizedWeight`.

    The layers are no submodules: they have more than parameters to their weights (attributes of
    tensors, tensor subclasses), which rebuilding and casting a model would lose. What they store is
    shared with the parameters of this module, so that these are its memory (but for NF4's tables of
    levels, 1 KiB for a matrix). They stay on the device on which they were made.
    """

    keeps_dtype = True

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = tuple(layer.eval().requires_grad_(False) for layer in layers)
        for i, layer in enumerate(self.layers):
            for name, tensor in _storage(layer).items():
                self.register_parameter(f"{name}_{i}", nn.Parameter(tensor, requires_grad=False))

    def matmul(self, x: Tensor) -> Tensor:
        """x [n, ..., K] -> [n, ..., N], in x's dtype."""
        return torch.stack([self.one(i, part) for i, part in enumerate(x)])

    def one(self, i: int, x: Tensor) -> Tensor:
        """x [..., K] times the i-th matrix alone -> [..., N]."""
        y = self.layers[i](x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], -1)


def _library(backend: str) -> ModuleType:
    name = {"bitsandbytes": "bitsandbytes", "torchao": "torchao.quantization"}[backend]
    # bitsandbytes warns of its inputs' dtype at every product of LLM.int8.
    logging.getLogger(backend).setLevel(logging.ERROR)
    try:
        with quiet_imports():
            return importlib.import_module(name)
    except ImportError:
        raise missing_extra(f"--ptq_backend {backend}", backend, EXTRAS[backend]) from None


def _int8_bitsandbytes(bnb: ModuleType, W: Tensor, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(W.shape[1], W.shape[0], bias=False, has_fp16_weights=False)
    # Weights are quantized when they leave the CPU's memory, even for the CPU itself.
    layer.weight = bnb.nn.Int8Params(W.cpu(), requires_grad=False)
    layer.to(W.device)
    layer.init_8bit_state()
    return layer


def _nf4_bitsandbytes(bnb: ModuleType, W: Tensor, dtype: torch.dtype) -> nn.Module:
    N, K = W.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(W, quant_type="nf4", module=layer)
    layer.to(W.device)
    if W.device.type == "cpu":
        # Its layout for CPUs with bfloat16 is made at the first product, of these shapes alone.
        layer.support_avx512bf16_for_cpu &= N % 32 == 0 and K % 64 == 0
        layer.eval()(torch.zeros(1, K, dtype=dtype))
    return layer


def _int8_torchao(torchao: ModuleType, W: Tensor, dtype: torch.dtype) -> nn.Module:
    layer = FusedLinear.of(W.to(dtype), None)
    # Its settings of the compiler would hold for the whole process.
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _storage(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a library's layer by name."""
    weight = layer.weight
    if hasattr(weight, "tensor_data_names"):  # torchao: a tensor made of tensors
        return {name: getattr(weight, name) for name in weight.tensor_data_names}
    state = getattr(layer, "state", None)
    if state is not None:  # LLM.int8
        return {"codes": state.CB, "scales": state.SCB}
    state = weight.quant_state
    tensors = {"codes": weight.data, "scales": state.absmax}
    if state.nested:
        tensors |= {"scales_of_scales": state.state2.absmax, "offset": state.offset}
    return tensors
