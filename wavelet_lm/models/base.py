"""What every language model of the project offers, on top of what its kind computes.

Everything that moves information along time has two faces that mean the same:

    y, state = layer(x, state)      x a whole text, or its next chunk, or one token

`state=None` starts a text, and calling never changes the state that was passed in. Training is one
call with T = block_size, prefill one with T = prompt length, decoding one with T = 1; any way of
cutting a text into chunks gives the same logits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wavelet_lm.config import Config
from wavelet_lm.models.losses import mean_cross_entropy, n_padded, token_cross_entropy
from wavelet_lm.transforms.joined import Joint


class LanguageModel(nn.Module):
    """Logits and losses from hidden vectors; a subclass gives `passes` and `output_weight`.

    Attributes:
        config: the `Config` it was built from.
        vocab_size: tokens that it knows.
        longest: tokens of the longest text that it can read; None = any number.
    """

    longest: int | None = None

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size

    def passes(self, idx: Tensor, state: Any) -> tuple[list[Tensor], Any]:
        """Vectors [B, T, H] ready for the head after each pass, for tokens idx [B, T] int64.

        The last one is the model's prediction, the others are trained beside it; there is one
        state for all of them.
        """
        raise NotImplementedError

    def output_weight(self) -> Tensor:
        """The head's matrix [vocab, H]."""
        raise NotImplementedError

    def joints(self) -> list[Joint]:
        """The head, which the loss reads padded; a classifier's network has none."""
        head = getattr(self, "head", None)
        return [] if head is None else [Joint([head.weight], n_padded(head.weight))]

    def project(self, x: Tensor) -> Tensor:
        """Logits [B, T, vocab] of vectors that are ready for the head."""
        return nn.functional.linear(x, self.output_weight())

    def forward(
        self, idx: Tensor, state: Any = None, *, last_only: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits of the next token at every position.

        Args:
            idx: [B, T] int64 tokens, a text or its next chunk.
            state: what the call for the previous chunk returned; None starts a text.
            last_only: project the last position alone (prefill).

        Returns:
            Logits [B, T, vocab] ([B, 1, vocab] with `last_only`), and the state.
        """
        x, state = self.hidden(idx, state)
        return self.project(x[:, -1:] if last_only else x), state

    def loss(
        self, idx: Tensor, targets: Tensor, state: Any = None, at: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Mean cross-entropy in nats per token over `targets` [B, T], a 0-d tensor; the state.

        In training it is the mean over all passes, each with its own prediction; the state may then
        be one of `first_window` and `next_window`. The state that is returned has no gradient.

        Args:
            at: [B, Q] int64, the positions that have a target, then [B, Q]; None = all.
        """
        passes, state = self.passes(idx, state)
        if at is not None:
            passes = [picked(x, at) for x in passes]
        losses = [
            mean_cross_entropy(x.flatten(0, 1), self.output_weight(), targets.flatten())
            for x in (passes if self.training else passes[-1:])
        ]
        return sum(losses) / len(losses), detached(state)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor, state: Any = None) -> Tensor:
        """Cross-entropy of every target [B, T] int64 in nats, float32, without gradients."""
        x, _ = self.hidden(idx, state)
        project, n_vocab = self.project, self.vocab_size
        losses = token_cross_entropy(x.flatten(0, 1), project, n_vocab, targets.flatten())
        return losses.view_as(targets)

    def hidden(self, idx: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The last pass's vectors [B, T, H] of tokens [B, T] int64, for the head; the state."""
        passes, state = self.passes(idx, state)
        return passes[-1], state

    # --- training windows that follow each other -------------------------------------------------

    def first_window(self, B: int, device: torch.device) -> Any:
        """The state that a training window starts with at the beginning of B texts."""
        return None

    def next_window(self, state: Any) -> Any:
        """The state that the next training window of the same texts starts with.

        It is that of their whole text with `carry_state`, dense, so that a compiled step finds all
        windows alike; else nothing, or what a kind hands on.

        Args:
            state: what `loss` returned for the window before it.
        """
        if not self.config.carry_state:
            return None
        return tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, state)

    # --- parts ------------------------------------------------------------------------------------

    def networks(self) -> list["LanguageModel"]:
        """The networks that it consists of, itself where it is one."""
        return [self]

    def first_block(self) -> list[nn.Module]:
        """The modules that one block is made of."""
        return [part for network in self.networks() for part in network.first_block()]


def detached(state: Any) -> Any:
    """A state without gradients, which a compiled step would else prepare to receive."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)


def picked(x: Tensor, at: Tensor) -> Tensor:
    """The vectors of x [B, T, H] at the positions `at` [B, Q] int64: [B, Q, H]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
