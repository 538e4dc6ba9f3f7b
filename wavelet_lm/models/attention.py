"""Causal self-attention whose state is a cache of keys and values."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from wavelet_lm.config import ModelConfig
from wavelet_lm.transforms.ring import Ring


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al., 2017, "Attention Is All You Need").

    Its state is [B, context − 1, 2C]: keys and values, side by side, of the last positions, zeros
    before the text; or a `Ring` of them. How many of them there are is told by the caller.
    """

    def __init__(self, config: ModelConfig, context: int):
        super().__init__()
        C = config.C
        self.heads, self.max_lag = config.heads, context - 1
        self.qkv = nn.Linear(C, 3 * C)
        self.projection = nn.Linear(C, C)
        self.dropout = nn.Dropout(config.dropout_projection)

    def forward(
        self, x: Tensor, state: Tensor | Ring | None, count: Tensor | None
    ) -> tuple[Tensor, Tensor | Ring]:
        """Read a text or its next chunk.

        Args:
            x: [B, T, C].
            state: what the call for the previous chunk returned; None starts a text.
            count: [B] int64, the positions read before; None with a state of None.

        Returns:
            [B, T, C], and the state after it.
        """
        B, T, C = x.shape
        q, new = self.qkv(x).split((C, 2 * C), -1)
        if state is None:
            known, mask = new, None
            state = _last(new, self.max_lag)
        elif isinstance(state, Ring):
            state.write(new)
            known = state.buffer.to(new.dtype)
            # Of the slots that look newer than the position, none belongs to the text.
            mask = state.clock.lags(state.size, T) <= _positions(count, T)[..., None]
        else:
            n_known = min(int(count.max()), self.max_lag)
            known = torch.cat((state[:, self.max_lag - n_known :].to(new.dtype), new), 1)
            state = _last(torch.cat((state.to(new.dtype), new), 1), self.max_lag)
            lags = n_known + _range(T, x)[:, None] - _range(n_known + T, x)
            mask = (lags >= 0) & (lags <= _positions(count, T)[..., None])
        k, v = known.chunk(2, -1)
        y = scaled_dot_product_attention(
            *(self._by_head(part) for part in (q, k, v)),
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
        )
        return self.dropout(self.projection(y.transpose(1, 2).reshape(B, T, C))), state

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _last(x: Tensor, n: int) -> Tensor:
    """The last n positions of x [B, T, C], with zeros before them where there are fewer."""
    T = x.shape[1]
    return x[:, T - n :] if T >= n else nn.functional.pad(x, (0, 0, n - T, 0))


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _positions(count: Tensor, T: int) -> Tensor:
    """[B, T]: the numbers of the next T positions after `count` [B]."""
    return count[:, None] + _range(T, count)
