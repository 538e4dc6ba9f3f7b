"""From the name in the config to the network."""

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.gpt.model import GPT
from wavelet_lm.models.wavelet_lm.ensemble import MultinodalLM
from wavelet_lm.models.wavelet_lm.model import WaveletLM

MODELS = {"wavelet_lm": WaveletLM, "gpt": GPT, "wavelet_gpt": GPT}
MOST_TENSORS = 5_000
# Modules register some tensors more than once (a tied head, shared nets).
REGISTRATIONS_PER_TENSOR = 8


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """A model with random weights in training mode; under `torch.device("meta")` none at all.

    Examples:
        >>> config = wavelet_lm.Config.from_json("configs/quickstart.json", C=16, layers=1)
        >>> model = wavelet_lm.build_model(config, vocab_size=256).eval()
        >>> idx = torch.randint(256, (2, 10))  # [B, T] int64
        >>> logits, state = model(idx)
        >>> logits.shape, logits.dtype
        (torch.Size([2, 10, 256]), torch.float32)
        >>> following, state = model(torch.randint(256, (2, 1)), state)  # the next token of each
        >>> following.shape
        torch.Size([2, 1, 256])
    """
    model = MultinodalLM if config.multinodal_enabled else MODELS[config.model]
    return model(config, vocab_size)


def model_without_weights(
    config: Config, vocab_size: int, source: str = "config", n_tensors: int = MOST_TENSORS
) -> LanguageModel:
    """`build_model` on the meta device: shapes alone, at no cost however large they are.

    Args:
        source: whose config this is, for the error.
        n_tensors: those that the weights should be; building stops where there are far more, which
            sizes that loop without end would reach.

    Raises:
        UserError: sizes that no tensor can have, or far more tensors.
    """
    left = REGISTRATIONS_PER_TENSOR * (n_tensors + 1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it has far more than {n_tensors:,} tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build_model(config, vocab_size)
    except (ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{source}: no model of these sizes can be built ({reason})") from None
    finally:
        hook.remove()


def n_params(model: nn.Module) -> int:
    """Distinct parameters, shared ones counted once, frozen ones included."""
    return sum(p.numel() for p in model.parameters())
