"""The weights as a process trains them: whole here, shares of them in `parallelize.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.working_weights import HALF

if TYPE_CHECKING:
    from wavelet_lm.training.sharded_checkpoint import ShardedCheckpoint

    Saved: TypeAlias = Checkpoint | ShardedCheckpoint
else:
    Saved = Checkpoint


class Weights:
    """All weights of a model, whole.

    `parameters` and `named_parameters` are what the optimizer steps on, as those of a module are.

    Attributes:
        are_whole: whether the model's own parameters are.
    """

    are_whole = True

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter [any shape], in the order of the model."""
        return self.model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without the names."""
        return (p for _, p in self.named_parameters())

    def take_gradients(self) -> None:
        """Called after backward: the gradients of these parameters are there after it."""

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients as one vector, 0-d."""
        return total_norm(list(gradients))

    def whole_shape(self, p: Tensor) -> torch.Size:
        """The shape of the weight that a parameter is, or is a share of."""
        return p.shape

    def on_whole(self, p: Tensor, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function makes of whole matrices.

        Args:
            p: one of parameters of one whole shape [rows, columns].
            values: n matrices in the shape of these parameters, [n, ...].
            function: from [n, rows, columns] to the same shape, of any dtype.

        Returns:
            The parts of the result, in the shape of `values`.
        """
        return function(values)

    def are_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return bool(torch.stack([p.isfinite().all() for p in self.parameters()]).all())

    def gathered(self) -> dict[str, Tensor]:
        """Every weight whole, by name, for the first process; for all processes."""
        return self.shares()

    def shares(self) -> dict[str, Tensor]:
        """Every weight by name, as a part of a whole one where it is a share."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some weights whole, by name, where they are; for all processes."""
        shares = self.shares()
        return {name: shares[name] for name in names}

    def load(self, checkpoint: Saved) -> None:
        """Take over the weights of a checkpoint; raises UserError where they do not fit."""
        checkpoint.load_into(self.model)

    def extra(self, checkpoint: Saved) -> dict[str, Tensor]:
        """Its other tensors, those of the optimizer in the shapes of these parameters."""
        return checkpoint.extra()

    def global_state(self, name: str, state: Tensor) -> Tensor:
        """A tensor of the optimizer, of any shape, as a part of a whole one where it is a share.

        Args:
            name: `optimizer/<part>/<parameter>/<key>`.
        """
        return state


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all of them together, of any shapes, 0-d in float32 at least."""
    halves = [g for g in gradients if g.dtype in HALF]
    if not halves:
        return nn.utils.get_total_norm(gradients)
    wide = [g for g in gradients if g.dtype not in HALF]
    # PyTorch's own would round the norm of each tensor to half precision.
    norms = torch._foreach_norm(halves, 2, torch.float32)
    norms += torch._foreach_norm(wide, 2) if wide else ()
    return torch.linalg.vector_norm(torch.stack(norms))
