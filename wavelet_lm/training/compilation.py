"""`torch.compile` of the training step, as the config asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wavelet_lm.compiler import compiled_or_plain
from wavelet_lm.config import TrainingConfig


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

    def loss(*args: Any, **kwargs: Any) -> Any:
        if function is not None:
            return function(*args, **kwargs)
        on_cuda = device.type == "cuda"
        cpu_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state(device) if on_cuda else None

        def first(loss: Callable[..., Any]) -> Any:
            nonlocal function
            result = loss(*args, **kwargs)
            function = loss
            return result

        def plain() -> Any:
            torch.set_rng_state(cpu_state)
            if on_cuda:
                torch.cuda.set_rng_state(cuda_state, device)
            return first(model.loss)

        return compiled_or_plain(
            lambda: first(torch.compile(model.loss)),
            plain,
            required=config.compile is True,
            way_out="--compile auto",
            log=log,
        )

    return loss
