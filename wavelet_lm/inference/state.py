"""The state of a model in buffers of fixed size, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from wavelet_lm.models.wavelet_lm.memory import FastWeights
from wavelet_lm.transforms.history import Clock, Ring


class StaticState:
    """`state` mirrors a model's: a `Ring` for every history, one clock for all counts.

    Fast weights, which grow while they learn, stay as they are: `state` then holds new ones after
    every step.
    """

    def __init__(self, state: Any, max_step: int):
        self.max_step = max_step
        self.clock = Clock(_position(state))
        self.state = tree_map(self._open, state, is_leaf=_grows)

    def _open(self, leaf: Any) -> Any:
        if leaf is None or _grows(leaf):
            return leaf
        return self.clock if _is_count(leaf) else Ring(leaf, self.clock, self.max_step)

    def narrow(self, start: int, stop: int) -> StaticState:
        """The texts from `start` up to `stop`, in the same memory; of what has a fixed size."""
        part = copy.copy(self)
        part.clock = clock = self.clock.narrow(start, stop)

        def narrow(leaf: Any) -> Any:
            if isinstance(leaf, Ring):
                return leaf.narrow(start, stop, clock)
            return clock if isinstance(leaf, Clock) else leaf

        part.state = tree_map(narrow, self.state, is_leaf=_grows)
        return part

    def snapshot(self) -> Any:
        """A state as the model returns it, of new tensors."""
        return tree_map(_close, self.state, is_leaf=_grows)

    def load(self, state: Any) -> None:
        """Write another state of the same shapes into the buffers."""
        self.clock.set(_position(state))
        for ring, history in zip(self._rings(), _histories(state), strict=True):
            ring.load(history)

    def load_row(self, row: int, state: Any) -> None:
        """Write the state of one text over that of a row."""
        self.clock.position[row : row + 1] = _position(state)
        clock = self.clock.narrow(row, row + 1)
        for ring, history in zip(self._rings(), _histories(state), strict=True):
            ring.narrow(row, row + 1, clock).load(history)

    def buffers(self) -> list[Tensor]:
        """All tensors that a step writes to, of any shapes."""
        return [self.clock.position, *(ring.buffer for ring in self._rings())]

    def _rings(self) -> list[Ring]:
        return [leaf for leaf in _leaves(self.state) if isinstance(leaf, Ring)]


def _grows(node: Any) -> bool:
    return isinstance(node, FastWeights)


def _is_count(leaf: Tensor) -> bool:
    return leaf.dtype == torch.int64


def _leaves(state: Any) -> list[Any]:
    """The leaves of what has a fixed size."""
    if state is None or _grows(state):
        return []
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in _leaves(part)]
    return [state]


def _histories(state: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(state) if not _is_count(leaf)]


def _position(state: Any) -> Tensor:
    """[B] tokens read, a new tensor; 0 where nothing depends on it."""
    leaves = _leaves(state)
    counts = [leaf for leaf in leaves if _is_count(leaf)]
    if counts:
        return counts[0].clone()
    return torch.zeros(len(leaves[0]), dtype=torch.int64, device=leaves[0].device)


def _close(leaf: Any) -> Any:
    if isinstance(leaf, Ring):
        return leaf.history()
    return leaf.position.clone() if isinstance(leaf, Clock) else leaf
