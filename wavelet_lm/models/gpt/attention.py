"""Causal self-attention whose state is a cache of keys and values."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from wavelet_lm.config import ModelConfig
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.history import Clock, Ring, counted, remember


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al., 2017, "Attention Is All You Need").

    Its state is [B, context − 1, 2C]: keys and values, side by side, of the last positions, zeros
    before the text; or a `Ring` of them. How many of them there are is told by the caller.
    """

    component = "attention"

    def __init__(self, config: ModelConfig, context: int):
        super().__init__()
        C = config.C
        self.heads, self.max_lag = config.heads, context - 1
        # Scores and their product with the values, half of them masked.
        self.n_products = 2 * context * C
        self.qkv = nn.Linear(C, 3 * C)
        self.projection = nn.Linear(C, C)
        self.dropout = Dropout(config.dropout_projection)

    def forward(
        self, x: Tensor, state: Tensor | Ring | None, count: Tensor | Clock
    ) -> tuple[Tensor, Tensor | Ring]:
        """Read a text or its next chunk.

        Args:
            x: [B, T, C].
            state: what the call for the previous chunk returned; None starts a text.
            count: [B] int64, the positions read before.

        Returns:
            [B, T, C], and the state after it.
        """
        B, T, C = x.shape
        q, new = self.qkv(x).split((C, 2 * C), -1)
        signal = remember(new, state, self.max_lag)
        known, mask = signal.visible(counted(count))
        k, v = known.to(new.dtype).chunk(2, -1)
        y = scaled_dot_product_attention(
            *(self._by_head(part) for part in (q, k, v)),
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
        )
        return self.dropout(self.projection(y.transpose(1, 2).reshape(B, T, C))), signal.state

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
