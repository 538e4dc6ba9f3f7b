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
    function = torch.compile(model.loss)
    works = False

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal function, works
        if works:
            return function(*args, **kwargs)
        generator = torch.get_rng_state()
        try:
            result = function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            if config.compile is True:
                raise UserError(
                    f"compile is true and torch.compile failed ({reason}); use --compile auto"
                ) from error
            log(f"going on without torch.compile, which failed: {reason}")
            torch.set_rng_state(generator)
            function = model.loss
            result = function(*args, **kwargs)
        works = True
        return result

    return loss
