"""A model and its state behind three verbs: read a prompt, decode a token, go back.

`Decoder.prefill` reads texts in parallel and returns a state that nothing ever changes; `start`
opens a `Session` on such a state, which reads token by token and writes only its own buffers, of
fixed size and place, so that a step can be compiled whole and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from wavelet_lm.compiler import MERGED_KERNELS
from wavelet_lm.devices import reading
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import fuse, weight_bytes_per_token
from wavelet_lm.fusion.linear import computing_dtype
from wavelet_lm.inference.context import apply_context
from wavelet_lm.inference.state import StaticState
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.gpt.model import check_length
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.models.wavelet_lm.memory import learning, resting
from wavelet_lm.quantization.weights import use_cpu_layout

# Positions of a prompt that are read at once: what bounds the memory that a long prompt needs.
PREFILL_POSITIONS = 4096
GRAPH_WARM_UP_STEPS = 3
# With one text, a product reads a matrix once and does nothing else: as a reduction it is left to
# the compiler's own kernels, and the best of them is searched for.
REDUCTIONS = {"coordinate_descent_tuning": True}

Texts = Sequence[Sequence[int]]
Step = Callable[[], None]


class Decoder:
    """Reads texts with the fused model of `model`; every row of a batch is what it would be alone.

    Args:
        model: left as it is; or one whose weights are stored (`models/weights.py`).
        context: what a token sees of the text: `stream` (as the model itself reads), `window:N`,
            `recompute:N` or `auto` (`context.py`).
        dtype: of the weights and the computation; None keeps the model's.
        compile: compile whole steps with torch.compile.
        adapt: the fast weights learn while decoding; None asks the model's config.

    Attributes:
        model: the fused model, with its context.
        device: where its tensors are.
        vocab_size: V of the logits.
        vectors: of the tokens, as the fused model reads them; `vectors[tokens]` is [n, C].
        merging: options with which steps are compiled on a GPU, or none (`compiler.py`).
    """

    def __init__(
        self,
        model: nn.Module | StoredModel,
        *,
        context: str = "stream",
        dtype: torch.dtype | None = None,
        compile: bool = False,
        adapt: bool | None = None,
    ):
        fused = model
        if isinstance(model, (LanguageModel, StoredModel)):
            if adapt is None:
                original = model.model if isinstance(model, StoredModel) else model
                adapt = original.config.fwpkm_inference_updates
            model = fuse(model, dtype, adapt=adapt)
            if next(model.parameters()).is_cpu and computing_dtype(model) != torch.float64:
                use_cpu_layout(model)
            fused = model
            model = apply_context(model, context)
        self.model = model
        self.vectors = TokenVectors(fused)
        self.adapts = bool(adapt)
        self.compile = compile
        for given, what in ((compile, "compile"), (context.startswith("recompute"), context)):
            if self.adapts and given:
                raise UserError(
                    f"{what} and fwpkm_inference_updates exclude each other: fast weights grow"
                    " with the text; leave out one of them"
                )
        self.vocab_size: int = model.vocab_size
        self.device = next(model.parameters()).device
        self.merging = MERGED_KERNELS if self.device.type == "cuda" else {}

    def prefill(self, texts: Texts, state: Any = None) -> tuple[Tensor, Any]:
        """Read one text per row, each of its own length (1 or more tokens).

        On a CPU each is read as if it were alone, so that no text depends on the others. On a GPU,
        where nothing is gained by that (`kernels/step_matmul.py`), all rows are read together up
        to the end of the shortest, the others on to the end of the next, and so on: nothing is
        padded. Fast weights are read but do not learn from a prompt.

        Args:
            texts: B lists of tokens.
            state: of B texts that these continue; None starts texts.

        Returns:
            Next-token logits [B, V], float32 at least, and the state after every row's own end.
        """
        if state is None:
            self.check_length(max(map(len, texts)))
        elif self.adapts:
            state = resting(state)
        if self.device.type != "cpu":
            return self._read_together(texts, state)
        starts = [None if state is None else self.rows(state, [row]) for row in range(len(texts))]
        read = [self._read_together([t], start) for t, start in zip(texts, starts, strict=True)]
        logits, states = zip(*read, strict=True)
        return torch.cat(logits), stacked(states)

    def _read_together(self, texts: Texts, state: Any) -> tuple[Tensor, Any]:
        going, at = list(range(len(texts))), 0
        ended: list[int] = []
        logits, states = [], []
        for end in sorted({len(text) for text in texts}):
            idx = torch.tensor([list(texts[row][at:end]) for row in going], device=self.device)
            for chunk in idx.split(max(1, PREFILL_POSITIONS // len(going)), dim=1):
                row_logits, state = self.read(chunk, state, last_only=True)
            here = [i for i, row in enumerate(going) if len(texts[row]) == end]
            further = [i for i, row in enumerate(going) if len(texts[row]) > end]
            logits.append(row_logits[here, -1])
            states.append(self.rows(state, here))
            ended += [going[i] for i in here]
            if further:
                state, at = self.rows(state, further), end
                going = [going[i] for i in further]
        order = [ended.index(row) for row in range(len(texts))]
        return torch.cat(logits)[order], self.rows(stacked(states), order)

    def rows(self, state: Any, rows: Sequence[int]) -> Any:
        """The state of these rows of a batch, in this order; a row may come more than once."""
        rows = list(rows)
        leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
        if rows == list(range(len(leaves[0]))):
            return state
        index = torch.tensor(rows, device=self.device)
        return tree_map_only(Tensor, lambda leaf: leaf[index], state)

    def start(self, state: Any, max_step: int = 1) -> Session:
        """Decode on from a state, up to `max_step` tokens at once."""
        if not isinstance(self.model, LanguageModel):
            return FunctionalSession(self, state, max_step)
        if self.adapts and max_step > 1:
            raise UserError("fast weights that learn cannot be taken back: fwpkm_inference_updates")
        return StaticSession(self, learning(state) if self.adapts else state, max_step)

    def read(self, idx: Tensor, state: Any, last_only: bool = False) -> tuple[Tensor, Any]:
        """idx [B, T] int64 -> logits [B, T or 1, V], in float32 at least, and the new state."""
        with reading(self.model):
            logits, state = self.model(idx, state, last_only=last_only)
        return wide_logits(logits), state

    def accelerate(self, step: Step, owners: Sequence[Any]) -> Step:
        """A step that is called again and again, as fast as the device allows.

        owners: objects whose `buffers()` are all that the step changes; where one has None, its
            state is not of fixed size and the step runs as it is.
        """
        buffers = [owner.buffers() for owner in owners]
        if any(b is None for b in buffers):
            return step
        if self.compile:
            options = {**REDUCTIONS, **self.merging} if self.device.type == "cuda" else {}
            step = torch.compile(step, fullgraph=True, dynamic=False, options=options)
        if self.device.type == "cuda":
            return CapturedStep(step, [buffer for part in buffers for buffer in part])
        return step

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that can be read; None = any number."""
        return getattr(self.model, "longest", None)

    def check_length(self, n: int) -> None:
        """Raise `UserError` where a text of n tokens is more than can be read."""
        if self.longest is not None:
            check_length(n, self.longest)

    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one token of one text reads, as often as they are read again."""
        return weight_bytes_per_token(self.model)


class TokenVectors:
    """The embeddings of tokens; those of a multinodal model's cells side by side.

    Of a model that is none of the project's nothing is known, and its tokens are all alike.
    """

    def __init__(self, model: nn.Module):
        cells = model.networks() if isinstance(model, LanguageModel) else []
        self._tables = [cell.embedding for cell in cells]
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __getitem__(self, tokens: Tensor) -> Tensor:
        """Tokens [n] -> [n, C]."""
        if not self._tables:
            return torch.zeros(len(tokens), 1, device=self.device)
        return torch.cat([table(tokens) for table in self._tables], dim=-1)


class Session:
    """B texts being decoded in step, up to `max_step` tokens at once."""

    decoder: Decoder
    max_step: int

    def decode(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [B, T] int64, T ≤ max_step: logits after each, [B, T, V]."""
        raise NotImplementedError

    def rollback(self, n: int) -> None:
        """Forget the last n tokens of every row, n ≤ max_step and at most as many as decoded."""
        raise NotImplementedError

    def state(self) -> Any:
        """The state now, as `Decoder.prefill` returns it: later decoding does not change it."""
        raise NotImplementedError

    def load(self, state: Any, rows: Sequence[int]) -> None:
        """Go on from another state instead: row i from row rows[i] of `state`."""
        raise NotImplementedError

    def buffers(self) -> list[Tensor] | None:
        """What `decode` changes in place, of any shapes; None where it makes new tensors."""
        raise NotImplementedError


class StaticSession(Session):
    """A session of a model with a state of fixed size for each block."""

    def __init__(self, decoder: Decoder, state: Any, max_step: int):
        self.decoder, self.max_step = decoder, max_step
        self._state = StaticState(state, max_step)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        self._check_length()
        logits, self._state.state = self.decoder.model(tokens, self._state.state)
        self._state.clock.advance(tokens.shape[1])
        return wide_logits(logits)

    @torch.no_grad()
    def rollback(self, n: int) -> None:
        self._state.clock.advance(-n)

    @torch.no_grad()
    def state(self) -> Any:
        return self._state.snapshot()

    @torch.no_grad()
    def load(self, state: Any, rows: Sequence[int]) -> None:
        self._state.load(self.decoder.rows(state, rows))

    def _check_length(self) -> None:
        """Refuse a step past the context, as far as that can be seen without waiting for a GPU.

        Texts of a batch that have ended run on there, and so does what is read ahead and taken
        back: nobody looks at what comes of it.
        """
        if self.decoder.longest is None or torch.compiler.is_compiling():
            return
        if self.decoder.device.type == "cpu":
            ahead = self.max_step if self.max_step > 1 else 0
            self.decoder.check_length(int(self._state.clock.position.min()) + 1 - ahead)

    def buffers(self) -> list[Tensor] | None:
        return None if self.decoder.adapts else self._state.buffers()


class FunctionalSession(Session):
    """A session of any model: a new state for every token, and the last few of them kept."""

    def __init__(self, decoder: Decoder, state: Any, max_step: int):
        self.decoder, self.max_step = decoder, max_step
        self._states = [state]  # the newest last, one per token that can be taken back

    def decode(self, tokens: Tensor) -> Tensor:
        logits = []
        for column in tokens.split(1, dim=1):
            step, state = self.decoder.read(column, self._states[-1])
            logits.append(step)
            self._states = [*self._states, state][-self.max_step - 1 :]
        return torch.cat(logits, 1)

    def rollback(self, n: int) -> None:
        self._states = self._states[: len(self._states) - n]

    def state(self) -> Any:
        return self._states[-1]

    def load(self, state: Any, rows: Sequence[int]) -> None:
        self._states = [self.decoder.rows(state, rows)]

    def buffers(self) -> None:
        return None


class CapturedStep:
    """A step as a CUDA graph: one launch in place of some hundred."""

    def __init__(self, step: Step, buffers: Sequence[Tensor]):
        self._step, self._buffers = step, buffers
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None:
            self._capture()
        self._graph.replay()

    def _capture(self) -> None:
        """Warm up (which compiles, and chooses kernels), undo what that did, and record."""
        before = [buffer.clone() for buffer in self._buffers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(old)


def stacked(states: Sequence[Any]) -> Any:
    """The states of several batches as that of one."""
    if len(states) == 1:
        return states[0]
    return tree_map(lambda *parts: parts[0] if parts[0] is None else torch.cat(parts), *states)


def wide_logits(logits: Tensor) -> Tensor:
    """Logits of any shape in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
