"""The baselines: a GPT, and the GPT with moving averages between its blocks (WaveletGPT)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.gpt.attention import Attention
from wavelet_lm.roles import FACTOR, declared
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.history import Clock, Ring, counted
from wavelet_lm.transforms.moving_averages import MovingAverages

INIT_STD = 0.02


class GPTBlockState(NamedTuple):
    """What a block remembers of a text.

    attention: keys and values [B, block_size − 1, 2C]; average: of the moving averages after the
    block, None where there are none; count: [B] int64, the positions read, of all blocks the same.
    """

    attention: Tensor | Ring | None
    average: Tensor | Ring | None
    count: Tensor | Clock


State = tuple[GPTBlockState, ...]


class GPT(LanguageModel):
    """A pre-norm decoder in the manner of GPT-2 with learned positions; it reads `longest` tokens.

    Radford et al., 2019, "Language Models are Unsupervised Multitask Learners". With model
    `wavelet_gpt` every block but the last is followed by `MovingAverages` (Verma, 2024,
    "WaveletGPT: Wavelets Meet Large Language Models"). As in that paper the head has a dense layer
    of `head_hidden` units with GELU before the vocabulary; 0 leaves it out.
    """

    def __init__(self, config: Config, vocab_size: int):
        super().__init__(config, vocab_size)
        C, self.longest = config.C, config.block_size
        self.embedding = declared(nn.Embedding(vocab_size, C), "embedding")
        self.position_embedding = declared(nn.Embedding(config.block_size, C), "positions")
        self.embedding_dropout = Dropout(config.dropout_embedding)
        self.blocks = nn.ModuleList(
            GPTBlock(config, is_last=i == config.layers - 1) for i in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(C)
        self.dense: nn.Module = nn.Identity()
        if config.head_hidden:
            self.dense = declared(
                nn.Sequential(nn.Linear(C, config.head_hidden), nn.GELU()), "head"
            )
        self.head_dropout = Dropout(config.dropout_lm_head)
        head = nn.Linear(config.head_hidden or C, vocab_size, bias=False)
        self.head = declared(head, "head", weight=FACTOR)
        self.apply(_initialise)
        for block in self.blocks:
            for last in (block.attention.projection, block.mlp.contract):
                nn.init.normal_(last.weight, std=INIT_STD / math.sqrt(2 * config.layers))
        if config.tie_embedding_to_lm_head:
            self.head.weight = self.embedding.weight

    def first_block(self) -> list[nn.Module]:
        return [self.blocks[0]]

    def output_weight(self) -> Tensor:
        return self.head.weight

    def project(self, x: Tensor) -> Tensor:
        return self.head(x)

    def passes(self, idx: Tensor, state: State | None) -> tuple[list[Tensor], State]:
        """There is one pass: idx [B, T] int64 -> [hidden states [B, T, C]], state."""
        x, state = self.encode(idx, state)
        return [self.head_dropout(self.dense(x))], state

    def encode(self, idx: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tokens [B, T] int64 -> normalised vectors [B, T, C] before the head, and the state.

        Raises:
            UserError: the text is longer than the context.
        """
        embedding = self.embedding(idx)
        positions = self._positions(embedding, state)
        x = self.embedding_dropout(embedding + self.position_embedding(positions))
        new = []
        for i, block in enumerate(self.blocks):
            inputs = (x, None if state is None else state[i])
            again = i < self.config.recomputed(len(self.blocks))
            if again and self.training and torch.is_grad_enabled():
                x, block_state = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, block_state = block(*inputs)
            new.append(block_state)
        return self.final_norm(x), tuple(new)

    def _positions(self, embedding: Tensor, state: State | None) -> Tensor:
        """The numbers of the positions of [B, T, C], as [T] or [B, T]."""
        T = embedding.shape[1]
        offsets = torch.arange(T, device=embedding.device)
        if state is None:
            check_length(T, self.longest)
            return offsets
        count = counted(state[0].count)
        n_read = count.largest()
        if n_read is not None:
            check_length(n_read + T, self.longest)
        # Decoding reads ahead of a text's end and takes back: what comes there is not used.
        return (count.position[:, None] + offsets).clamp(max=self.longest - 1)


class GPTBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), then the moving averages, where there are any."""

    def __init__(self, config: Config, is_last: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.C)
        self.attention = Attention(config, config.block_size)
        self.norm2 = nn.LayerNorm(config.C)
        self.mlp = GPTMLP(config)
        self.average = None
        if config.model == "wavelet_gpt" and not is_last:
            self.average = MovingAverages(
                config.wavelet_module,
                config.C,
                config.block_size,
                config.wavelet_fraction,
                config.wavelet_shared_kernels,
            )

    def forward(self, x: Tensor, state: GPTBlockState | None) -> tuple[Tensor, GPTBlockState]:
        """[B, T, C] -> [B, T, C], a text or its next chunk, and the state after it."""
        B, T, _ = x.shape
        if state is None:
            state = GPTBlockState(None, None, torch.zeros(B, dtype=torch.int64, device=x.device))
        cache, average, count = state
        update, cache = self.attention(self.norm1(x), cache, count)
        x = x + update
        x = x + self.mlp(self.norm2(x))
        if self.average is not None:
            x, average = self.average(x, average)
        return x, GPTBlockState(cache, average, counted(count).after(T))


class GPTMLP(nn.Module):
    """Linear(C → C·expansion), GELU, Linear(→ C), dropout."""

    component = "MLP"

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.C * config.gpt_mlp_expansion
        self.expand = nn.Linear(config.C, hidden)
        self.contract = nn.Linear(hidden, config.C)
        self.dropout = Dropout(config.dropout_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.dropout(self.contract(nn.functional.gelu(self.expand(x))))


def check_length(n: int, longest: int) -> None:
    """Raise `UserError` for a text of n tokens that is longer than what a model can read."""
    if n > longest:
        raise UserError(
            f"a text of {n:,} tokens is too long for this GPT, which reads {longest:,} (its"
            f" block_size); ask for less, use --context recompute:{longest}, or train with a larger"
            " block_size"
        )


def _initialise(module: nn.Module) -> None:
    """GPT-2's: N(0, 0.02), biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
