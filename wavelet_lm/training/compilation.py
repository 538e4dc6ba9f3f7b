"""`torch.compile` of the training step, as the config asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wavelet_lm.compiler import compiled_or_plain, first_that_compiles, training_options
from wavelet_lm.config import TrainingConfig


def compiled(
    model: nn.Module, config: TrainingConfig, device: torch.device, log: Callable[[str], None]
) -> Callable[..., Any]:
    """`model.loss`, compiled or not.

    `auto` compiles on CUDA alone: on a CPU the compiler takes a minute and gains 10–20% with these
    models (their time goes into matrix products either way). The first call tries whether the
    compiler works here, forward and backward, on CUDA with merged kernels and then without: where
    it does not, `auto` says so and goes on without it, `true` stops. `auto` leaves it out where
    weights step in backward: a compiled backward pass hands over all gradients at its end.
    """
    leave_out = device.type != "cuda" or config.optimizer_in_backward
    if config.compile is False or (config.compile == "auto" and leave_out):
        return model.loss
    log("compiling the training step; the first one takes a minute or more")
    function: Callable[..., Any] | None = None

    def tried(loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The function, after a step whose gradients go nowhere and that draws no random number."""
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            value = loss(*args, **kwargs)[0]
            # As in the loop, whose backward pass stands outside of autocast.
            with torch.autocast(device.type, enabled=False):
                if value.requires_grad:
                    torch.autograd.grad(value, trained, allow_unused=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a kernel that fails says so only then
        return loss

    def compiled_loss(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        def merging(options: dict[str, Any]) -> Callable[..., Any]:
            given = {"options": options} if options else {}
            return tried(torch.compile(model.loss, **given), *args, **kwargs)

        options = training_options() if device.type == "cuda" else [{}]
        return first_that_compiles(merging, options, log)

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal function
        if function is None:
            function = compiled_or_plain(
                lambda: compiled_loss(*args, **kwargs),
                lambda: model.loss,
                required=config.compile is True,
                way_out="--compile auto",
                log=log,
            )
        return function(*args, **kwargs)

    return loss
