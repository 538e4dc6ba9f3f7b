"""A GPT-2 of a given size with a key-value cache, from transformers: what decoding is held against.

At a position the cache holds random keys and values of that length: how long a step takes does not
depend on what they say. It is a `StaticCache` that ends where the measurement ends, so that a step
attends to the text so far and no further, and nothing is copied from token to token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavelet_lm.errors import UserError

# Channels per layer of the smallest GPT-2 (768 / 12); the larger ones are deeper.
CHANNELS_PER_LAYER = 64
HEAD_CHANNELS = 64
TOLERANCE = 0.05


def gpt_n_params(n_layer: int, n_embd: int, vocab_size: int) -> int:
    """Parameters of a GPT-2 whose head is its embedding, without the table of positions.

    Per layer 12 C² + 13 C: projections to q, k, v (3 C² + 3 C) and out (C² + C), the MLP
    (8 C² + 5 C) and two norms (4 C). A token reads one row of the table, however long it is.
    """
    return vocab_size * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd


def gpt_shape(n_params: int, vocab_size: int) -> tuple[int, int, int]:
    """Layers, channels and heads of a GPT-2 with as many parameters, ± 5%.

    Heads are 64 channels wide where the size allows. Of the shapes that fit, the one whose ratio of
    channels to layers is nearest to the smallest GPT-2's.

    Raises:
        UserError: no shape fits.
    """
    for unit in (HEAD_CHANNELS, 16, 4, 1):
        fitting = []
        for n_embd in range(unit, n_params // vocab_size + 1, unit):
            per_layer = gpt_n_params(1, n_embd, vocab_size) - gpt_n_params(0, n_embd, vocab_size)
            n_layer = round((n_params - gpt_n_params(0, n_embd, vocab_size)) / per_layer)
            if n_layer < 1:
                continue
            size = gpt_n_params(n_layer, n_embd, vocab_size)
            if abs(size - n_params) <= TOLERANCE * n_params:
                ratio = n_embd / n_layer / CHANNELS_PER_LAYER
                fitting.append((max(ratio, 1 / ratio), n_layer, n_embd))
        if fitting:
            _, n_layer, n_embd = min(fitting)
            width = next(w for w in range(min(HEAD_CHANNELS, n_embd), 0, -1) if n_embd % w == 0)
            return n_layer, n_embd, n_embd // width
    raise UserError(
        f"no GPT with a vocabulary of {vocab_size:,} has {n_params:,} parameters; --no_gpt leaves"
        " it out, --vocab takes a smaller vocabulary"
    )


def check_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            "the GPT needs transformers; install it with"
            ' python -m pip install -c constraints.txt -e ".[bench]", or leave it out: --no_gpt'
        ) from None


class CachedGPT:
    """A GPT-2 with random weights.

    Attributes:
        shape: layers, channels, heads.
        n_params: without the table of positions.
        n_position_params: the table's, one row per position up to the longest.
        weight_bytes_per_token: of what one token reads, without its rows of the two tables.
    """

    def __init__(
        self,
        n_params: int,
        vocab_size: int,
        n_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        from transformers import GPT2Config, GPT2LMHeadModel

        n_layer, n_embd, n_head = self.shape = gpt_shape(n_params, vocab_size)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        with device:
            self.model = GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)
        self.dtype, self.device = dtype, device
        self.n_position_params = n_positions * n_embd
        total = sum(p.numel() for p in self.model.parameters())
        self.n_params = total - self.n_position_params
        self.weight_bytes_per_token = self.n_params * dtype.itemsize

    def cache_bytes(self, batch: int, length: int) -> int:
        """Keys and values of every layer."""
        n_layer, n_embd, _ = self.shape
        return 2 * n_layer * batch * length * n_embd * self.dtype.itemsize

    def start(self, batch: int, position: int, room: int) -> CachedText:
        """Texts of `position` tokens each, to be continued by at most `room` more."""
        return CachedText(self, batch, position, room)


class CachedText:
    """A greedy text: each step reads the token that the last one chose."""

    def __init__(self, gpt: CachedGPT, batch: int, position: int, room: int):
        from transformers import StaticCache

        self._gpt, self._position = gpt, position
        self._cache = StaticCache(config=gpt.model.config, max_cache_len=position + room)
        _, n_embd, n_head = gpt.shape
        like = torch.empty(batch, n_head, 1, n_embd // n_head, dtype=gpt.dtype, device=gpt.device)
        for layer in self._cache.layers:
            layer.lazy_initialization(like, like)
            layer.keys.normal_()
            layer.values.normal_()
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=gpt.device)
        self.rewind()

    def rewind(self) -> None:
        """Back to the position where it started."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._position)

    @torch.no_grad()
    def step(self) -> None:
        logits = self._gpt.model(self.tokens, past_key_values=self._cache, use_cache=True).logits
        self.tokens.copy_(logits[:, -1:].argmax(-1))

    def buffers(self) -> list[Tensor]:
        """What a step moves on; the keys and values that it overwrites come again."""
        return [self.tokens, *(layer.cumulative_length for layer in self._cache.layers)]
