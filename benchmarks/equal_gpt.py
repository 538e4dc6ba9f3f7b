"""The project's GPT at a given number of parameters: what decoding is held against.

At a position its cache holds random keys and values of that length: how long a step takes does not
depend on what they say. The cache ends where the measurement ends, so that a step attends to the
text so far and no further.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.gpt.model import GPT, GPTBlockState
from wavelet_lm.models.registry import n_params

# Channels per layer of the smallest GPT-2 (768 / 12); the larger ones are deeper.
CHANNELS_PER_LAYER = 64
HEAD_CHANNELS = 64
TOLERANCE = 0.05


def gpt_n_params(layers: int, C: int, vocab_size: int) -> int:
    """Parameters of a GPT whose head is its embedding, without the table of positions.

    Per layer 12 C² + 13 C: projections to q, k, v (3 C² + 3 C) and out (C² + C), the MLP
    (8 C² + 5 C) and two norms (4 C). A token reads one row of the table, however long it is.
    """
    return vocab_size * C + layers * (12 * C**2 + 13 * C) + 2 * C


def gpt_shape(n_params: int, vocab_size: int) -> tuple[int, int, int]:
    """Layers, channels and heads of a GPT with as many parameters, ± 5%.

    Heads are 64 channels wide where the size allows. Of the shapes that fit, the one whose ratio of
    channels to layers is nearest to the smallest GPT-2's.

    Raises:
        UserError: no shape fits.
    """
    for unit in (HEAD_CHANNELS, 16, 4, 1):
        fitting = []
        for C in range(unit, n_params // vocab_size + 1, unit):
            per_layer = gpt_n_params(1, C, vocab_size) - gpt_n_params(0, C, vocab_size)
            layers = round((n_params - gpt_n_params(0, C, vocab_size)) / per_layer)
            if layers < 1:
                continue
            size = gpt_n_params(layers, C, vocab_size)
            if abs(size - n_params) <= TOLERANCE * n_params:
                ratio = C / layers / CHANNELS_PER_LAYER
                fitting.append((max(ratio, 1 / ratio), layers, C))
        if fitting:
            _, layers, C = min(fitting)
            width = next(w for w in range(min(HEAD_CHANNELS, C), 0, -1) if C % w == 0)
            return layers, C, C // width
    raise UserError(
        f"no GPT with a vocabulary of {vocab_size:,} has {n_params:,} parameters; --no_gpt leaves"
        " it out, --vocab takes a smaller vocabulary"
    )


def gpt_training_flops(layers: int, C: int, vocab_size: int, context: int) -> int:
    """FLOPs of the matrix products of one training token, attention over all positions.

    Forward 2 (V C + 12 layers C²) and 4 layers T C for attention, and twice as many backward.
    """
    return 3 * (2 * (vocab_size * C + layers * 12 * C**2) + 4 * layers * context * C)


def gpt_shape_of_flops(flops: int, vocab_size: int, context: int) -> tuple[int, int, int]:
    """As `gpt_shape`, of the GPT whose training token takes nearest to so many FLOPs.

    Raises:
        UserError: no shape is within `TOLERANCE`.
    """
    best: tuple[float, tuple[int, int, int]] | None = None
    size, step = flops // 6, 1 + TOLERANCE / 2
    for power in range(-60, 3):  # attention takes the more of the FLOPs the longer the context is
        try:
            shape = gpt_shape(int(size * step**power), vocab_size)
        except UserError:
            continue
        layers, C, _ = shape
        off = abs(gpt_training_flops(layers, C, vocab_size, context) / flops - 1)
        if best is None or off < best[0]:
            best = (off, shape)
    if best is None or best[0] > TOLERANCE:
        raise UserError(
            f"no GPT with a vocabulary of {vocab_size:,} and a context of {context:,} takes"
            f" {flops:,} FLOPs a token"
        )
    return best[1]


def gpt_config(shape: tuple[int, int, int], context: int) -> Config:
    """Of a GPT of these layers, channels and heads whose head is its embedding."""
    layers, C, heads = shape
    return Config(
        model="gpt",
        C=C,
        layers=layers,
        heads=heads,
        block_size=context,
        head_hidden=0,
        tie_embedding_to_lm_head=True,
    )


class EqualGPT:
    """A GPT with random weights, ready to decode.

    It is not compiled, which would be done anew for every length of its cache; on a GPU its steps
    are captured as a CUDA graph.

    Attributes:
        shape: layers, channels, heads.
        n_params: without the table of positions.
        n_position_params: the table's, one row per position up to `context`.
        weight_bytes_per_token: of what one token reads.
    """

    def __init__(
        self, size: int, vocab_size: int, context: int, dtype: torch.dtype, device: torch.device
    ):
        self.shape = gpt_shape(size, vocab_size)
        with device:
            model = GPT(gpt_config(self.shape, context), vocab_size)
        self.decoder = Decoder(model, dtype=dtype)
        self.dtype, self.device = dtype, device
        self.n_position_params = model.position_embedding.weight.numel()
        self.n_params = n_params(model) - self.n_position_params
        self.weight_bytes_per_token = self.decoder.weight_bytes_per_token()

    def cache_bytes(self, batch: int, length: int) -> int:
        """Keys and values of every layer."""
        layers, C, _ = self.shape
        return 2 * layers * batch * length * C * self.dtype.itemsize

    def start(self, batch: int, position: int, room: int) -> CachedText:
        """Texts of `position` tokens each, to be continued by at most `room` more."""
        return CachedText(self, batch, position, room)


class CachedText:
    """A greedy text: each step reads the token that the last one chose.

    Attributes:
        tokens: [B, 1] int64, the last ones chosen.
        step: takes one more.
    """

    def __init__(self, gpt: EqualGPT, batch: int, position: int, room: int):
        layers, C, _ = gpt.shape
        like = torch.zeros(1, 1, 1, dtype=gpt.dtype, device=gpt.device)
        cache = like.expand(batch, position + room - 1, 2 * C)
        count = torch.full((batch,), position, device=gpt.device)
        self.position = position
        self.session = session = gpt.decoder.start((GPTBlockState(cache, None, count),) * layers)
        self._clock, *caches = session.buffers()
        for cache in caches:
            cache.normal_()
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=gpt.device)
        self.step: Callable[[], None] = gpt.decoder.accelerate(
            lambda: self._draw(session.decode(self.tokens)[:, -1]), (session, self)
        )

    @torch.no_grad()
    def _draw(self, logits: Tensor) -> None:
        self.tokens.copy_(logits.argmax(-1, keepdim=True))

    def buffers(self) -> list[Tensor]:
        return [self.tokens]

    def rewind(self) -> None:
        """Back to the position where it started."""
        self.session.rollback(int(self._clock[0]) - self.position)
