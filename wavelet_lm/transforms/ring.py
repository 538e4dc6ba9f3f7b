"""The static face of whatever remembers the past: buffers of fixed size, written in place.

A layer called as `y, state = layer(x, state)` returns a new state, made of new tensors. Decoding
token by token would copy the whole past for every token; so the decoder hands the layers `Ring`s in
place of their histories. A layer that gets one writes to it and returns the very same one.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Clock:
    """How far the texts of a batch are: `position` [B] int64, the tokens read. Rings share it."""

    def __init__(self, position: Tensor):
        self.position = position
        self._known: dict[tuple[str, int, int], Tensor] = {}

    def advance(self, n: int) -> None:
        """n tokens on; a negative n takes tokens back."""
        self.position.add_(n)
        if self._known:
            self._known.clear()

    def set(self, position: Tensor) -> None:
        self.position.copy_(position)
        self._known.clear()

    def slots(self, size: int, T: int) -> Tensor:
        """[B, T]: where a ring of `size` holds the next T positions."""
        return self._once("slots", size, T)

    def lags(self, size: int, T: int) -> Tensor:
        """[B, T, size]: how far each slot lies back, seen from each of the next T positions."""
        return self._once("lags", size, T)

    def _once(self, what: str, size: int, T: int) -> Tensor:
        """All rings of one size need the same numbers in one step."""
        if torch.compiler.is_compiling():
            return self._compute(what, size, T)
        key = (what, size, T)
        if key not in self._known:
            self._known[key] = self._compute(what, size, T)
        return self._known[key]

    def _compute(self, what: str, size: int, T: int) -> Tensor:
        device = self.position.device
        if what == "slots":
            return (self.position[:, None] + torch.arange(T, device=device)) % size
        return (self.slots(size, T)[..., None] - torch.arange(size, device=device)) % size


class Ring:
    """The last positions of a signal: position p lies in slot p mod R of `buffer` [B, R, C].

    R is `max_lag` + `max_step`: the past that the layer looks back to, and room for the most
    positions that are written at once. The same room lets that many be taken back: what was
    written after them is overwritten later, and never read.
    """

    def __init__(self, history: Tensor, clock: Clock, max_step: int):
        """history: [B, max_lag, C], the positions before the clock's."""
        B, self.max_lag, C = history.shape
        self.clock = clock
        self.buffer = history.new_zeros(B, self.max_lag + max_step, C)
        self._rows = torch.arange(B, device=history.device)[:, None]
        self.load(history)

    @property
    def size(self) -> int:
        return self.buffer.shape[1]

    def load(self, history: Tensor) -> None:
        """Start from another past, [B, max_lag, C]."""
        self.buffer[self._rows, self._past_slots()] = history.to(self.buffer.dtype)

    def history(self) -> Tensor:
        """[B, max_lag, C], the positions before the clock's: a copy."""
        return self.buffer[self._rows, self._past_slots()]

    def write(self, x: Tensor) -> None:
        """Put x [B, T, C] at the next T ≤ max_step positions; the clock is moved by its owner."""
        slots = self.clock.slots(self.size, x.shape[1])
        self.buffer.index_put_((self._rows, slots), x.to(self.buffer.dtype))

    def delayed(self, lag: int, T: int) -> Tensor:
        """The signal `lag` ≤ max_lag positions before each of the next T: [B, T, C]."""
        return self.buffer[self._rows, (self.clock.slots(self.size, T) - lag) % self.size]

    def filtered(self, kernel: Tensor, T: int) -> Tensor:
        """Σ_o kernel_o x_{t−o} for the next T positions t: [B, T, C].

        kernel: [R], by lag, zero beyond max_lag.
        """
        weights = kernel.to(self.buffer.dtype)[self.clock.lags(self.size, T)]
        return weights @ self.buffer

    def _past_slots(self) -> Tensor:
        lags = torch.arange(self.max_lag, 0, -1, device=self.buffer.device)
        return (self.clock.position[:, None] - lags) % self.size
