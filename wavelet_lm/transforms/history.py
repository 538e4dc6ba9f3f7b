"""What a layer knows of a signal's past: one small interface, in two forms.

A layer is called as `y, state = layer(x, state)`. It never asks what its state is made of:

    signal = remember(x, state, max_lag)      x [B, T, C] with what came before it
    y = signal.delayed(lag)                   or .filtered(taps), .whole(), .visible(count)
    return y, signal.state

    scan = carried(state)                     of a recurrence, whose past is its last output
    y = …scan.before…
    return y, scan.after(y)

    count = counted(state)                    how many positions there were
    count.up_to(T), count.after(T)

The functional form makes new tensors and leaves its state alone. Decoding token by token would copy
the whole past for every token, so a session puts buffers of fixed size in place of the tensors: a
`Ring` for a history, one `Clock` for all counts. They are written in place and returned as they
came.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.correlation import MAX_SHIFTED_TAPS, DelayedSum, correlate


class Signal(Protocol):
    """The next T positions of a signal with the `max_lag` ones before them.

    Attributes:
        state: the past of what comes next, to be returned by the layer.
    """

    state: Tensor | Ring

    def delayed(self, lag: int) -> Tensor:
        """The signal `lag` ≤ max_lag positions before each of the T: [B, T, C]."""

    def filtered(self, taps: Tensor, min_lag: int = 0) -> Tensor:
        """Σ_j taps_j x_{t−min_lag−j} for each of the T, taps [K], K + min_lag ≤ max_lag + 1.

        Returns [B, T, C]; the taps are the same for every channel.
        """

    def whole(self) -> Tensor:
        """All of it in the order of time, zeros before the text: [B, max_lag + T, C]."""

    def visible(self, count: Count) -> tuple[Tensor, Tensor | None]:
        """What attention may look at in a text of up to `max_lag` positions, of which `count` came.

        Returns positions [B, N, C] in any order, and whether each of the T may see each of them,
        [B, T, N] bool; None: the T positions are all there is, each sees those up to itself.
        """


def remember(x: Tensor, state: Tensor | Ring | None, max_lag: int) -> Signal:
    """x [B, T, C] after its past, [B, max_lag, C]; None: nothing came before (zeros)."""
    if isinstance(state, Ring):
        state.write(x)
        return RingSignal(state, x.shape[1])
    return Window(x, state, max_lag)


class Carry(Protocol):
    """The last output of a recurrence; `state` is a tensor [B, C] or [B, 1, C], or a ring of it.

    Attributes:
        keeps_every: whether `after` needs the output of every position, or the last alone will do.
    """

    keeps_every: bool

    def before(self) -> Tensor:
        """It, in the shape that the state was given."""

    def place(self, dtype: torch.dtype) -> Tensor | None:
        """Where the next output may be put, over the last one, [B, 1, C]; None: nowhere."""

    def after(self, y: Tensor) -> Tensor | Ring:
        """The state when the recurrence has given y [B, T, C], or [B, 1, C] of the last one."""


def carried(state: Tensor | Ring) -> Carry:
    """The past behind a recurrence's state, [B, C] or [B, 1, C] or a ring of it."""
    return state if isinstance(state, Ring) else LastOutput(state)


def counted(state: Tensor | Clock) -> Count | Clock:
    """The count of [B] texts' positions behind a state."""
    return state if isinstance(state, Clock) else Count(state)


# --- the functional form -------------------------------------------------------------------------


class Window:
    """A `Signal` of tensors, which are never changed."""

    def __init__(self, x: Tensor, past: Tensor | None, max_lag: int):
        self._x, self._past, self._max_lag = x, past, max_lag
        self._whole: Tensor | None = None

    @property
    def state(self) -> Tensor:
        """The last `max_lag` positions, [B, max_lag, C]."""
        T = self._x.shape[1]
        if T >= self._max_lag:  # nothing need be put together
            return self._x[:, T - self._max_lag :]
        return self.whole()[:, T:]

    def whole(self) -> Tensor:
        if self._whole is None:
            x = self._x
            if self._past is None:
                self._whole = nn.functional.pad(x, (0, 0, self._max_lag, 0))
            else:
                self._whole = torch.cat((self._past.to(x.dtype), x), dim=1)
        return self._whole

    def delayed(self, lag: int) -> Tensor:
        start = self._max_lag - lag
        return self.whole()[:, start : start + self._x.shape[1]]

    def filtered(self, taps: Tensor, min_lag: int = 0) -> Tensor:
        T, K = self._x.shape[1], len(taps)
        is_short = self._past is None and K <= MAX_SHIFTED_TAPS
        if torch.compiler.is_compiling() and self._x.is_cuda and is_short:
            return DelayedSum.apply(taps.to(self._x.dtype), self._x, min_lag)
        start = self._max_lag - min_lag - K + 1
        # The largest lag comes first in time.
        signal = self.whole()[:, start : start + T + K - 1]
        return correlate(signal, taps.flip(0).to(signal.dtype), T)

    def visible(self, count: Count) -> tuple[Tensor, Tensor | None]:
        if self._past is None:
            return self._x, None
        T, n_most = self._x.shape[1], count.largest()
        n_known = self._max_lag if n_most is None else min(n_most, self._max_lag)
        known = self.whole()[:, self._max_lag - n_known :]
        positions = torch.arange(n_known + T, device=known.device)
        lags = positions[n_known:, None] - positions
        # Of what looks older than the text nothing belongs to it.
        return known, (lags >= 0) & (lags < count.up_to(T)[..., None])


class LastOutput:
    """A `Carry` of a tensor."""

    keeps_every = False

    def __init__(self, state: Tensor):
        self._state = state

    def before(self) -> Tensor:
        return self._state

    def place(self, dtype: torch.dtype) -> None:
        return None

    def after(self, y: Tensor) -> Tensor:
        return y[:, -1] if self._state.ndim == 2 else y[:, -1:]


class Count:
    """`position` [B] int64: how many positions of each text came before."""

    def __init__(self, position: Tensor):
        self.position = position

    def up_to(self, T: int) -> Tensor:
        """[B, T]: how many positions there are up to and with each of the next T."""
        return self.position[:, None] + torch.arange(1, T + 1, device=self.position.device)

    def after(self, T: int) -> Tensor | Clock:
        """The state T positions on, [B] int64 where it is a tensor."""
        return self.position + T

    def largest(self) -> int | None:
        """The most positions of a text; None where it would make the host wait, or in a graph."""
        return None if torch.compiler.is_exporting() else int(self.position.max())


# --- buffers of fixed size -----------------------------------------------------------------------


class Clock(Count):
    """A count that is moved in place, one for all rings of a batch.

    What rings ask in a step is the same for many of them, and on a GPU every answer is a launch: it
    is computed once a step, the places of all rings in one go.
    """

    def __init__(self, position: Tensor):
        super().__init__(position)
        self._places: dict[tuple[int, int], int] = {}  # (size, lag) -> row of the two below
        self._sizes = self._lags = position.new_zeros(0, 1, 1)
        self._kernels: dict[int, tuple[ref[Tensor], dict[tuple, Tensor]]] = {}  # by id(taps)
        self._known: dict[tuple, Tensor] = {}

    def after(self, T: int) -> Clock:
        """Itself: its owner moves it when the whole model has read the T positions."""
        return self

    def largest(self) -> None:
        return None

    def advance(self, n: int) -> None:
        """n tokens on; a negative n takes tokens back."""
        self.position.add_(n)
        if self._known:
            self._known.clear()

    def set(self, position: Tensor) -> None:
        """Start at other positions, [B] int64."""
        self.position.copy_(position)
        self._known.clear()

    def narrow(self, start: int, stop: int) -> Clock:
        """A clock of the texts from `start` up to `stop`, whose positions are those here."""
        part = copy.copy(self)
        part.position, part._known = self.position[start:stop], {}
        return part

    def serve(self, size: int, lags: Iterable[int]) -> None:
        """Expect to be asked for `slots` of a ring of this size, these lags back."""
        places = [*self._places, *((size, lag) for lag in lags)]
        self._places = {place: i for i, place in enumerate(dict.fromkeys(places))}
        columns = self.position.new_tensor([*self._places]).view(-1, 2, 1, 1)
        self._sizes, self._lags = columns.unbind(1)

    def up_to(self, T: int) -> Tensor:
        return self._once(("up to", T), lambda: super(Clock, self).up_to(T))

    def slots(self, size: int, T: int, lag: int = 0) -> Tensor:
        """[B, T] int64: where a ring of `size` has what is `lag` before each of the next T."""
        if torch.compiler.is_compiling() or (size, lag) not in self._places:
            return (self.up_to(T) - (lag + 1)) % size
        slots = self._once(("slots", T), lambda: (self.up_to(T) - (self._lags + 1)) % self._sizes)
        return slots[self._places[size, lag]]

    def lags(self, size: int, T: int) -> Tensor:
        """[B, T, size] int64: how far each slot lies back, seen from each of the next T."""

        def compute() -> Tensor:
            slots = self.slots(size, T)
            return (slots[..., None] - torch.arange(size, device=slots.device)) % size

        return self._once(("lags", size, T), compute)

    def weights(self, taps: Tensor, min_lag: int, size: int, dtype: torch.dtype, T: int) -> Tensor:
        """[B, T, size]: what each slot counts for in a filter of taps [K] from `min_lag` on."""

        def by_lag() -> Tensor:
            return nn.functional.pad(taps, (min_lag, size - min_lag - len(taps))).to(dtype)

        if torch.compiler.is_compiling():
            return by_lag()[self.lags(size, T)]
        kernels = self._kernels_of(taps)
        what = (min_lag, size, dtype)
        if what not in kernels:
            kernels[what] = by_lag()
        key = ("weights", taps, *what, T)
        return self._once(key, lambda: kernels[what][self.lags(size, T)])

    def _kernels_of(self, taps: Tensor) -> dict[tuple, Tensor]:
        """What is known of the taps while they live: of a filter that still learns, for one step.

        A dictionary of tensors' own would take as long as the product itself.
        """
        key = id(taps)
        known = self._kernels.get(key)
        if known is None or known[0]() is not taps:
            kernels = self._kernels
            kernels[key] = known = (ref(taps, lambda _: kernels.pop(key, None)), {})
        return known[1]

    def _once(self, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        """All rings need the same numbers in one step."""
        if torch.compiler.is_compiling():
            return compute()
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


class Ring:
    """The last positions of a signal: position p lies in slot p mod R of `buffer` [B, R, C].

    R is `max_lag` + `max_step`: the past that the layer looks back to, and room for the most
    positions that are written at once. The same room lets that many be taken back: what was
    written after them is overwritten later, and never read. It is the `Carry` of a recurrence too.
    With a `max_step` of 0 one position is written at once, none is taken back, and a recurrence has
    one slot, read and written as it is.
    """

    keeps_every = True

    def __init__(self, history: Tensor, clock: Clock, max_step: int):
        """history: [B, max_lag, C], the positions before the clock's, or [B, C], the last one."""
        self._is_one = history.ndim == 2
        B, self.max_lag, C = (history[:, None] if self._is_one else history).shape
        self.clock = clock
        size = 1 if self._is_one and not max_step else self.max_lag + max(1, max_step)
        self.buffer = history.new_zeros(B, size, C)
        self._rows = torch.arange(B, device=history.device)[:, None]
        clock.serve(self.size, {0, 1, self.max_lag})
        self.load(history)

    @property
    def size(self) -> int:
        """R, its slots."""
        return self.buffer.shape[1]

    def narrow(self, start: int, stop: int, clock: Clock) -> Ring:
        """A ring of the texts from `start` up to `stop`, in the same memory; `clock`: of those."""
        part = copy.copy(self)
        part.buffer, part._rows = self.buffer[start:stop], self._rows[: stop - start]
        part.clock = clock
        return part

    def load(self, history: Tensor) -> None:
        """Start from another past, in the shape of the first one."""
        history = history[:, None] if self._is_one else history
        self.buffer[self._rows, self._past_slots()] = history.to(self.buffer.dtype)

    def history(self) -> Tensor:
        """The positions before the clock's, in the shape of what the ring began with: a copy."""
        history = self.buffer[self._rows, self._past_slots()]
        return history[:, 0] if self._is_one else history

    def write(self, x: Tensor) -> None:
        """Put x [B, T, C] at the next T ≤ max_step positions; the clock is moved by its owner."""
        slots = self.clock.slots(self.size, x.shape[1])
        self.buffer.index_put_((self._rows, slots), x.to(self.buffer.dtype))

    def at(self, lag: int, T: int) -> Tensor:
        """What stands `lag` ≤ max_lag positions before each of the next T: [B, T, C]."""
        return self.buffer[self._rows, self.clock.slots(self.size, T, lag)]

    def before(self) -> Tensor:
        last = self.buffer if self.size == 1 else self.at(1, 1)
        return last[:, 0] if self._is_one else last

    def place(self, dtype: torch.dtype) -> Tensor | None:
        """The one slot [B, 1, C], where nobody asks for gradients and no compiler plans memory."""
        free = self.size == 1 and self.buffer.dtype == dtype and not torch.is_grad_enabled()
        return self.buffer if free and not torch.compiler.is_compiling() else None

    def after(self, y: Tensor) -> Ring:
        if self.size == 1:
            if torch.compiler.is_compiling() or y.data_ptr() != self.buffer.data_ptr():
                self.buffer.copy_(y)
        else:
            self.write(y)
        return self

    def _past_slots(self) -> Tensor:
        lags = torch.arange(self.max_lag, 0, -1, device=self.buffer.device)
        return (self.clock.position[:, None] - lags) % self.size


class RingSignal:
    """A `Signal` whose positions lie in a ring, the newest T just written.

    Where these are yet to be written, all is there but they themselves: what lies T or more
    positions back.
    """

    def __init__(self, ring: Ring, T: int):
        self.state, self._T = ring, T

    def delayed(self, lag: int) -> Tensor:
        return self.state.at(lag, self._T)

    def filtered(self, taps: Tensor, min_lag: int = 0) -> Tensor:
        ring = self.state
        dtype = ring.buffer.dtype
        return ring.clock.weights(taps, min_lag, ring.size, dtype, self._T) @ ring.buffer

    def whole(self) -> Tensor:
        ring = self.state
        slots = ring.clock.slots(ring.size, self._T)[:, :1] - ring.max_lag
        places = torch.arange(ring.max_lag + self._T, device=slots.device)
        return ring.buffer[ring._rows, (slots + places) % ring.size]

    def visible(self, count: Count) -> tuple[Tensor, Tensor]:
        ring = self.state
        # Of the slots that look newer than the position, none belongs to the text.
        lags = ring.clock.lags(ring.size, self._T)
        return ring.buffer, lags < count.up_to(self._T)[..., None]
