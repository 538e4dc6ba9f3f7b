"""`torch.compile` of the training step, as the config asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import UserError


def compiled(
    model: nn.Module, config: TrainingConfig, device: torch.device, log: Callable[[str], None]
) -> Callable[..., Any]:
    """`model.loss`, compiled or not.

    `auto` compiles on CUDA alone: on a CPU the compiler takes a minute and gains 10–20% with these
    models (their time goes into matrix products either way). The first call decides whether the
    compiler works here: where it does not, `auto` says so and goes on without, `true` stops.
    """
    if config.compile is False or (config.compile == "auto" and device.type != "cuda"):
        return model.loss
    log("compiling the training step; the first one takes a minute or more")
    function: Callable[..., Any] | None = None
    works = False

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal function, works
        if works:
            return function(*args, **kwargs)
        on_cuda = device.type == "cuda"
        cpu_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state(device) if on_cuda else None
        try:
            function = torch.compile(model.loss)
            result = function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if config.compile is True:
                raise UserError(
                    f"compile is true and torch.compile failed ({reason}); use --compile auto"
                ) from error
            log(f"going on without torch.compile, which failed: {reason}")
            torch.set_rng_state(cpu_state)
            if on_cuda:
                torch.cuda.set_rng_state(cuda_state, device)
            function = model.loss
            result = function(*args, **kwargs)
        works = True
        return result

    return loss
