"""The state of a model in buffers of fixed size, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from wavelet_lm.models.block import BlockState
from wavelet_lm.models.gpt import GPTBlockState
from wavelet_lm.transforms.exponential_mean import ExponentialMeanState
from wavelet_lm.transforms.ring import Clock, Ring
from wavelet_lm.transforms.running_mean import RunningMeanState
from wavelet_lm.transforms.windowed_mean import WindowedMeanState

MeanState = RunningMeanState | WindowedMeanState | ExponentialMeanState
AnyBlockState = BlockState | GPTBlockState


def is_block_state(state: Any) -> bool:
    return isinstance(state, AnyBlockState)


class StaticState:
    """`blocks` mirrors a model's state: a `Ring` for every history and mean, one clock for all.

    Fast weights, which grow while they learn, stay as they are: `blocks` then holds new ones after
    every step.
    """

    def __init__(self, state: Any, max_step: int):
        self.max_step = max_step
        first = tree_leaves(state, is_leaf=is_block_state)[0]
        self.clock = Clock(_position(first))
        self._mean_type = type(getattr(first, "mean", None))
        self.blocks = tree_map(self._open, state, is_leaf=is_block_state)

    def _open(self, state: AnyBlockState) -> AnyBlockState:
        ring = lambda history: Ring(history, self.clock, self.max_step)  # noqa: E731
        if isinstance(state, GPTBlockState):
            return GPTBlockState(*tree_map_only(Tensor, ring, state[:2]), self.clock.position)
        mean = None if state.mean is None else ring(_mean_history(state.mean))
        return BlockState(tree_map(ring, state.wavelet), mean, state.memory)

    def snapshot(self) -> Any:
        """A state as the model returns it, of new tensors."""
        return tree_map(self._close, self.blocks, is_leaf=is_block_state)

    def _close(self, block: AnyBlockState) -> AnyBlockState:
        if isinstance(block, GPTBlockState):
            histories = tree_map_only(Ring, Ring.history, block[:2])
            return GPTBlockState(*histories, self.clock.position.clone())
        wavelet = tree_map(Ring.history, block.wavelet, is_leaf=_is_ring)
        return BlockState(wavelet, self._close_mean(block.mean), block.memory)

    def _close_mean(self, ring: Ring | None) -> MeanState | None:
        if ring is None:
            return None
        history = ring.history()
        if self._mean_type is WindowedMeanState:
            return WindowedMeanState(history, self.clock.position.clone())
        if self._mean_type is ExponentialMeanState:
            return ExponentialMeanState(*history[:, 0].chunk(2, -1))
        return RunningMeanState(history[:, 0], self.clock.position.clone())

    def load(self, state: Any) -> None:
        """Write another state of the same shapes into the buffers."""
        new = tree_leaves(state, is_leaf=is_block_state)
        self.clock.set(_position(new[0]))
        for block, source in zip(self._leaves(), new, strict=True):
            for ring, history in zip(_rings(block), _histories(source), strict=True):
                ring.load(history)

    def buffers(self) -> list[Tensor]:
        """All tensors that a step writes to."""
        rings = [ring for block in self._leaves() for ring in _rings(block)]
        return [self.clock.position, *(ring.buffer for ring in rings)]

    def _leaves(self) -> list[AnyBlockState]:
        return tree_leaves(self.blocks, is_leaf=is_block_state)


def _position(state: AnyBlockState) -> Tensor:
    """[B] tokens read, a new tensor; 0 where nothing depends on it."""
    if isinstance(state, GPTBlockState):
        return state.count.clone()
    if isinstance(state.mean, RunningMeanState | WindowedMeanState):
        return state.mean.count.clone()
    leaf = next(leaf for leaf in tree_leaves(state) if leaf is not None)
    return torch.zeros(leaf.shape[0], dtype=torch.int64, device=leaf.device)


def _is_ring(x: Any) -> bool:
    return isinstance(x, Ring)


def _rings(block: AnyBlockState) -> list[Ring]:
    return [leaf for leaf in tree_leaves(block, is_leaf=_is_ring) if _is_ring(leaf)]


def _histories(state: AnyBlockState) -> list[Tensor]:
    """What the rings of such a state hold, in their order."""
    if isinstance(state, GPTBlockState):
        return [history for history in state[:2] if history is not None]
    means = [] if state.mean is None else [_mean_history(state.mean)]
    return [*tree_leaves(state.wavelet), *means]


def _mean_history(mean: MeanState) -> Tensor:
    """What a mean remembers, as [B, positions, channels]."""
    if isinstance(mean, WindowedMeanState):
        return mean.history
    if isinstance(mean, ExponentialMeanState):
        return torch.cat(mean, -1)[:, None]
    return mean.total[:, None]
