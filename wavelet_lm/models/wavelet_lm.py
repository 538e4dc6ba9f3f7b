"""The WaveletLM: embedding, a stack of wavelet blocks, a linear head.

Everything that moves information along time has two faces that mean the same:

    y, state = layer(x, state)      x a whole text, or its next chunk, or one token

`state=None` starts a text, and calling never changes the state that was passed in. Training is one
call with T = block_size, prefill one with T = prompt length, decoding one with T = 1; any way of
cutting a text into chunks gives the same logits.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wavelet_lm.config import Config
from wavelet_lm.models.block import Block, BlockState
from wavelet_lm.models.losses import mean_cross_entropy, token_cross_entropy
from wavelet_lm.transforms.lifting import build_wavelet

State = tuple[BlockState, ...]


class WaveletLM(nn.Module):
    """Attention-free language model; there is no positional embedding and no longest text.

    Attributes:
        config: the `Config` it was built from.
        vocab_size: tokens that it knows.
    """

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        C = config.C
        self.embedding = nn.Embedding(vocab_size, C)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(C))
        self.embedding_scale = math.sqrt(C) if config.stabilized("embed_scaling") else 1.0
        self.embedding_dropout = nn.Dropout(config.dropout_embedding)
        n_blocks = 1 if config.looped_blocks else config.layers
        n_wavelets = 1 if config.shared_lifting_weights else n_blocks
        self.wavelets = nn.ModuleList(
            build_wavelet(config, config.padded_channels) for _ in range(n_wavelets)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_blocks))
        # One pass through the stack, as block numbers; `loop_iterations` passes make the network.
        self.order = [0] * config.looped_blocks_count if config.looped_blocks else range(n_blocks)
        self.final_norm = nn.LayerNorm(C)
        self.head_dropout = nn.Dropout(config.dropout_lm_head)
        self.head = nn.Linear(C, vocab_size, bias=False)
        if config.tie_embedding_to_lm_head:
            self.head.weight = self.embedding.weight
        first_runs_once = list(self.order).count(0) * config.loop_iterations == 1
        if config.decompose_bypass and first_runs_once and not uses_carry(config):
            # Nothing comes before the first block, so its mix of the previous mean is never read.
            self.blocks[0].bypass.cross_layer_mix.requires_grad_(False)

    def forward(
        self,
        idx: Tensor,
        state: State | None = None,
        *,
        carry: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, State]:
        """Logits of the next token at every position.

        Args:
            idx: [B, T] int64 tokens, a text or its next chunk.
            state: what the call for the previous chunk returned; None starts a text.
            carry: [B, C], `window_carry` of the training window before this one.
            last_only: project the last position alone (prefill).

        Returns:
            Logits [B, T, vocab] ([B, 1, vocab] with `last_only`), and the state.
        """
        x, state = self.hidden(idx, state, carry)
        return self.head(x[:, -1:] if last_only else x), state

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        carry: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy in nats per token over `targets` [B, T], a 0-d tensor; the state.

        In training it is the mean over the `loop_iterations` passes, each with its own prediction.
        """
        passes, state = self._passes(idx, state, carry)
        losses = [
            mean_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
            for x in (passes if self.training else passes[-1:])
        ]
        return sum(losses) / len(losses), state

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor, state: State | None = None) -> Tensor:
        """Cross-entropy of every target [B, T] in nats, float32, without gradients."""
        x, _ = self.hidden(idx, state)
        losses = token_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
        return losses.view_as(targets)

    def hidden(
        self, idx: Tensor, state: State | None = None, carry: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The last block's output [B, T, C], normalised and ready for the head; the state."""
        passes, state = self._passes(idx, state, carry)
        return passes[-1], state

    def _passes(
        self, idx: Tensor, state: State | None, carry: Tensor | None
    ) -> tuple[list[Tensor], State]:
        """What `hidden` returns, for each pass through the stack; one state for all of them."""
        embedding = self.embedding(idx) * self.embedding_scale
        x = self.embedding_dropout(embedding)
        mean = None if carry is None else carry[:, None]
        passes, new_state = [], []
        old_states = iter(state or itertools.repeat(None))
        for _ in range(self.config.loop_iterations):
            for i, number in enumerate(self.order):
                wavelet = self.wavelets[number % len(self.wavelets)]
                y, mean, block_state = self._run(
                    self.blocks[number], x, embedding, mean, wavelet, next(old_states)
                )
                x = self._drop(x, y, i)
                new_state.append(block_state)
            passes.append(self.head_dropout(self.final_norm(x)))
        return passes, tuple(new_state)

    def _run(self, block: Block, *inputs: Any) -> tuple[Tensor, Tensor | None, BlockState]:
        """The block, its activations kept or (`gradient_checkpointing`) made again in backward."""
        if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _drop(self, x: Tensor, y: Tensor, i: int) -> Tensor:
        """Stochastic depth: in training x in place of y with probability rate · i / n_blocks."""
        p = self.config.stochastic_depth_rate * i / len(self.order)
        if not self.training or p == 0:
            return y
        return torch.where(torch.rand((), device=x.device) < p, x, y)


def uses_carry(config: Config) -> bool:
    """Whether training hands the running mean of one window to the next one of the same text."""
    return (
        config.decompose_bypass
        and config.decompose_bypass_cross_window
        and config.data_order == "sequential"
    )


def window_carry(state: State) -> Tensor:
    """The last block's running mean after a window: [B, C], detached, at least float32."""
    return state[-1].mean.mean.detach()
