"""Products of linear layers in 8-bit floating point, by torchao.

Both factors of a product are scaled to float8 as a whole and multiplied there, forward and
backward; weights, gradients and optimizer stay as they are, and all else is computed in bfloat16
(Micikevicius et al., 2022, "FP8 Formats for Deep Learning").
"""

import torch
from torch import nn

from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.quiet_imports import quiet_imports

CAPABILITY = (8, 9)  # from Ada on: RTX 40, L40, H100
MULTIPLE = 16  # of both sizes of a matrix, as the GPU's products need it


def refuse_without_float8(device: torch.device) -> None:
    """Raise UserError where the device has no such products."""
    name = str(device)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= CAPABILITY:
            return
        name = torch.cuda.get_device_name(device)
    raise UserError(
        f"amp_dtype fp8 needs a GPU with float8 products (RTX 40, L40, H100 or later) and this is"
        f" {name}; use --amp_dtype bf16, or auto"
    )


def use_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear layers of a model multiply in float8, but its head, where sizes allow it.

    One that does so already stays as it is.

    Args:
        emulate: round as float8 does and multiply as before, on any device.

    Raises:
        UserError: torchao is missing.
    """
    try:
        with quiet_imports():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise missing_extra("amp_dtype fp8", "torchao", "quant") from None

    def suits(layer: nn.Module, name: str) -> bool:
        is_head = name.rpartition(".")[2] == "head"  # the loss multiplies by its weight itself
        sizes = (layer.in_features, layer.out_features)
        return (
            type(layer) is nn.Linear and not is_head and all(size % MULTIPLE == 0 for size in sizes)
        )

    before = dict(model.named_modules())
    convert_to_float8_training(
        model, module_filter_fn=suits, config=Float8LinearConfig(emulate=emulate)
    )
    for name, layer in model.named_modules():
        for key in ("component", "roles"):  # what the layer that it replaces has declared
            if key in vars(before.get(name, layer)):
                setattr(layer, key, getattr(before[name], key))
