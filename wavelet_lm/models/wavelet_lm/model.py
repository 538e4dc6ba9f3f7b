"""The WaveletLM: embedding, a stack of wavelet blocks, a linear head."""

import math
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavelet_lm.config import Config
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.wavelet_lm.block import Block, BlockState
from wavelet_lm.models.wavelet_lm.wavelets import build_wavelet
from wavelet_lm.roles import FACTOR, Runs, declared
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.dtypes import as_factor

State = tuple[BlockState, ...]


class Carry(NamedTuple):
    """What one training window hands to the next of the same text: the last running mean [B, C]."""

    mean: Tensor


class Stream(NamedTuple):
    """What flows from block to block, each [B, T, C].

    x: the residual stream; embedding: of the tokens, before dropout; mean: the last block's running
    mean, or the carry of the last window as [B, 1, C], or None.
    """

    x: Tensor
    embedding: Tensor
    mean: Tensor | None


class WaveletLM(LanguageModel):
    """Attention-free language model; there is no positional embedding and no longest text."""

    def __init__(self, config: Config, vocab_size: int, bag: nn.Module | None = None):
        """bag: acts on the token embeddings [B, T, C]."""
        super().__init__(config, vocab_size)
        C = config.C
        self.embedding = declared(nn.Embedding(vocab_size, C), "embedding")
        std = 1 / math.sqrt(C) if config.embedding_std is None else config.embedding_std
        nn.init.normal_(self.embedding.weight, std=std)
        self.embedding_scale = math.sqrt(C) if config.stabilized("embed_scaling") else 1.0
        self.bag = nn.Identity() if bag is None else bag
        self.embedding_dropout = Dropout(config.dropout_embedding)
        n_blocks = 1 if config.looped_blocks else config.layers
        n_wavelets = 1 if config.shared_lifting_weights else n_blocks
        self.wavelets = nn.ModuleList(
            build_wavelet(config, config.padded_channels) for _ in range(n_wavelets)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_blocks))
        for n, block in enumerate(self.blocks):
            if block.delta_memory is not None:
                block.delta_memory.start_with(self.wavelets[n % n_wavelets].past_by_detail())
        # One pass through the stack, as block numbers; `loop_iterations` passes make the network.
        self.order = [0] * config.looped_blocks_count if config.looped_blocks else range(n_blocks)
        self.final_norm = nn.LayerNorm(C)
        self.head_dropout = Dropout(config.dropout_lm_head)
        head = nn.Linear(C, vocab_size, bias=False)
        self.head = declared(head, "head", weight=FACTOR)
        if config.tie_embedding_to_lm_head:
            self.head.weight = self.embedding.weight
        first_runs_once = list(self.order).count(0) * config.loop_iterations == 1
        if config.decompose_bypass and first_runs_once and not uses_carry(config):
            # Nothing comes before the first block, so its mix of the previous mean is never read.
            self.blocks[0].bypass.cross_layer_mix.requires_grad_(False)

    def runs(self) -> dict[nn.Module, Runs]:
        """Blocks and wavelets may be shared; the first block may have no mean before it.

        In training the head judges every pass, in generation only the last.
        """
        passes = self.config.loop_iterations
        order = passes * list(self.order)
        blocks = Counter(order)
        wavelets = Counter(n % len(self.wavelets) for n in order)
        runs = {self.blocks[n]: Runs(times, times) for n, times in blocks.items()}
        runs |= {self.wavelets[n]: Runs(times, times) for n, times in wavelets.items()}
        runs |= {self.final_norm: Runs(passes, passes), self.head: Runs(1, passes)}
        if self.blocks[0].bypass is not None:
            mixed = Fraction(blocks[0] - 1, blocks[0])
            runs[self.blocks[0].bypass.cross_layer_mix] = Runs(mixed, mixed)
        return runs

    def first_block(self) -> list[nn.Module]:
        shared = self.config.shared_lifting_weights
        return [self.blocks[0]] if shared else [self.blocks[0], self.wavelets[0]]

    def output_weight(self) -> Tensor:
        return self.head.weight

    def project(self, x: Tensor) -> Tensor:
        return self.head(x)

    def passes(self, idx: Tensor, state: State | Carry | None) -> tuple[list[Tensor], State]:
        """One pass through the stack of blocks for each of `loop_iterations`.

        idx [B, T] int64 -> what each pass ends with, [B, T, C], and the state.
        """
        carry, state = (state, None) if isinstance(state, Carry) else (None, state)
        x = self.start(idx, carry)
        passes = []
        old, new = iter(state or ()), []
        for _ in range(self.config.loop_iterations):
            for i in range(len(self.order)):
                x, block_state = self.run_block(i, x, next(old, None))
                new.append(block_state)
            passes.append(self.finish(x))
        return passes, tuple(new)

    def start(self, idx: Tensor, carry: Carry | None = None) -> Stream:
        """What the first block reads, for tokens [B, T] int64 and a window's carry."""
        embedding = self.bag(self.embedding(idx) * self.embedding_scale)
        mean = None if carry is None else carry.mean[:, None]
        return Stream(self.embedding_dropout(embedding), embedding, mean)

    def run_block(
        self, i: int, stream: Stream, state: BlockState | None
    ) -> tuple[Stream, BlockState]:
        """The i-th block of a pass, kept or made again in backward (`gradient_checkpointing`)."""
        number = self.order[i]
        block, wavelet = self.blocks[number], self.wavelets[number % len(self.wavelets)]
        inputs = (stream.x, stream.embedding, stream.mean, wavelet, state)
        again = i < self.config.recomputed(len(self.order))
        if again and self.training and torch.is_grad_enabled():
            y, mean, state = checkpoint(block, *inputs, use_reentrant=False)
        else:
            y, mean, state = block(*inputs)
        return Stream(self._drop(stream.x, y, i), stream.embedding, mean), state

    def finish(self, stream: Stream) -> Tensor:
        """The residual stream, normalised and ready for the head: [B, T, C]."""
        return self.head_dropout(as_factor(self.final_norm(stream.x)))

    def _drop(self, x: Tensor, y: Tensor, i: int) -> Tensor:
        """Stochastic depth: in training x in place of y with probability rate · i / n_blocks."""
        p = self.config.stochastic_depth_rate * i / len(self.order)
        if not self.training or p == 0:
            return y
        return torch.where(torch.rand((), device=x.device) < p, x, y)

    def first_window(self, B: int, device: torch.device) -> Carry | None:
        if not uses_carry(self.config):
            return None
        return Carry(torch.zeros(B, self.config.C, device=device))

    def next_window(self, state: State) -> State | Carry | None:
        """The whole state, or the last block's running mean: detached, at least float32."""
        if uses_carry(self.config):
            return Carry(state[-1].mean.mean.detach())
        return super().next_window(state)


def uses_carry(config: Config) -> bool:
    """Whether training hands the running mean of one window to the next one of the same text."""
    return (
        config.model == "wavelet_lm"
        and config.decompose_bypass
        and config.decompose_bypass_cross_window
        and config.data_order == "sequential"
        and not config.carry_state  # which has the mean, and all else
    )
