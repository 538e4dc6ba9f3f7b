"""What a token sees of the text before it, beyond the reach of the wavelets.

- `stream`: everything. The running mean is that of the whole text.
- `window:N`: the running mean is that of the last N positions, exactly, by a ring buffer.
- `recompute:N`: the model reads the last N tokens anew for every token, as it did in training; as
  slow as it sounds, and the reference for the other two.
- `auto`: `window:block_size` for a model with a running mean, else `stream`.

A GPT, which has positions up to block_size, streams up to there and recomputes up to that many.

In training the running mean never was one of more than block_size positions, and a window of as
many reads long texts slightly better: `plans/context_past_block_size.md`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.transforms.means import WindowedMean


class Context(NamedTuple):
    """kind: auto, stream, window or recompute; N: positions, 0 for the first two."""

    kind: str
    N: int


def parse_context(text: str) -> Context:
    """A context as it is typed.

    Raises:
        UserError: it is none of the four.
    """
    if text in ("auto", "stream"):
        return Context(text, 0)
    match = re.fullmatch(r"(window|recompute):([1-9]\d{0,8})", text)
    if match is None:
        raise UserError(f"context is {text!r}; it must be auto, stream, window:N or recompute:N")
    return Context(match[1], int(match[2]))


def apply_context(model: LanguageModel, context: str) -> nn.Module:
    """A fused model that reads with this context; `model` is changed or wrapped.

    Raises:
        UserError: the context is unknown, a window of a running mean that the model lacks, or
            longer than what the model can read.
    """
    kind, N = parse_context(context)
    if kind == "recompute":
        if model.longest is not None and N > model.longest:
            raise UserError(
                f"context {context} is longer than the {model.longest} positions of this model"
                f" (its block_size); use recompute:{model.longest} or less"
            )
        return Recomputed(model, N)
    config = model.config
    has_running_mean = (
        config.model == "wavelet_lm" and config.decompose_bypass and not config.decompose_bypass_ema
    )
    if kind == "auto" and has_running_mean:
        kind, N = "window", config.block_size
    if kind == "window":
        if not has_running_mean:
            raise UserError(
                f"context {context} limits the running mean and this model has none; use stream"
            )
        average = WindowedMean(N)
        for network in model.networks():
            for block in network.blocks:
                block.bypass.average = average
    return model


class RecentTokens(NamedTuple):
    """The last N tokens [B, N], the newest at the end, and how many of them there are, [B]."""

    tokens: Tensor
    count: Tensor


class Recomputed(nn.Module):
    """A model without memory: each position is read from the last N tokens alone."""

    def __init__(self, model: LanguageModel, N: int):
        super().__init__()
        self.model, self.N = model, N
        self.config, self.vocab_size = model.config, model.vocab_size
        self.eval()

    def forward(
        self, idx: Tensor, state: RecentTokens | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, RecentTokens]:
        """Logits [B, T, V] ([B, 1, V] with `last_only`) for tokens [B, T] int64; the state."""
        B, T = idx.shape
        if state is None:
            state = RecentTokens(idx.new_zeros(B, self.N), idx.new_zeros(B))
        tokens = torch.cat((state.tokens, idx), 1)
        logits = []
        for t in range(T - 1 if last_only else 0, T):
            lengths = (state.count + t + 1).clamp(max=self.N)
            last = tokens[:, : self.N + t + 1]
            step = None
            for length in lengths.unique().tolist():  # rows of one length are read together
                rows = lengths == length
                y = self.model(last[rows, -length:], last_only=True)[0][:, -1]
                step = y.new_empty(B, y.shape[-1]) if step is None else step
                step[rows] = y
            logits.append(step)
        count = (state.count + T).clamp(max=self.N)
        return torch.stack(logits, 1), RecentTokens(tokens[:, -self.N :], count)
