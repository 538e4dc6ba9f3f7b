"""What every language model of the project offers, on top of what its kind computes.

Everything that moves information along time has two faces that mean the same:

    y, state = layer(x, state)      x a whole text, or its next chunk, or one token

`state=None` starts a text, and calling never changes the state that was passed in. Training is one
call with T = block_size, prefill one with T = prompt length, decoding one with T = 1; any way of
cutting a text into chunks gives the same logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import Config
from wavelet_lm.models.losses import mean_cross_entropy, token_cross_entropy


class LanguageModel(nn.Module):
    """Logits and losses from hidden vectors; a subclass gives `passes` and `output_weight`.

    Attributes:
        config: the `Config` it was built from.
        vocab_size: tokens that it knows.
        gradient_scale: factor of the loss's gradient, not of its value.
        is_prepared: it is a twin for reading alone (`inference/prepared.py`).
        longest: tokens of the longest text that it can read; None = any number.
    """

    is_prepared = False
    longest: int | None = None

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.gradient_scale = 1.0

    def passes(self, idx: Tensor, state: Any, carry: Tensor | None) -> tuple[list[Tensor], Any]:
        """Hidden vectors [B, T, H] ready for the head, after each pass through the network.

        The last one is the model's prediction, the others are trained beside it; there is one
        state for all of them.
        """
        raise NotImplementedError

    def output_weight(self) -> Tensor:
        """The head's matrix [vocab, H]."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Logits [B, T, vocab] of vectors that are ready for the head."""
        return nn.functional.linear(x, self.output_weight())

    def forward(
        self,
        idx: Tensor,
        state: Any = None,
        *,
        carry: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits of the next token at every position.

        Args:
            idx: [B, T] int64 tokens, a text or its next chunk.
            state: what the call for the previous chunk returned; None starts a text.
            carry: `window_carry` of the training window before this one, where there is one.
            last_only: project the last position alone (prefill).

        Returns:
            Logits [B, T, vocab] ([B, 1, vocab] with `last_only`), and the state.
        """
        x, state = self.hidden(idx, state, carry)
        return self.project(x[:, -1:] if last_only else x), state

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        state: Any = None,
        *,
        carry: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mean cross-entropy in nats per token over `targets` [B, T], a 0-d tensor; the state.

        In training it is the mean over all passes, each with its own prediction.
        """
        passes, state = self.passes(idx, state, carry)
        losses = [
            mean_cross_entropy(x.flatten(0, 1), self.output_weight(), targets.flatten())
            for x in (passes if self.training else passes[-1:])
        ]
        loss = sum(losses) / len(losses)
        if self.gradient_scale != 1:
            value = loss.detach()
            loss = value + self.gradient_scale * (loss - value)
        return loss, state

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor, state: Any = None) -> Tensor:
        """Cross-entropy of every target [B, T] in nats, float32, without gradients."""
        x, _ = self.hidden(idx, state)
        project, n_vocab = self.project, self.vocab_size
        losses = token_cross_entropy(x.flatten(0, 1), project, n_vocab, targets.flatten())
        return losses.view_as(targets)

    def hidden(
        self, idx: Tensor, state: Any = None, carry: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """The last pass's vectors [B, T, H], normalised and ready for the head; the state."""
        parts = []
        for piece in self._pieces(idx, state):
            passes, state = self.passes(piece, state, carry)
            parts.append(passes[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), state

    def adapting(self, state: Any) -> Any:
        """The state of a prompt; with `fwpkm_inference_updates` the fast weights learn after it."""
        return state

    def resting(self, state: Any) -> Any:
        """The same state with fast weights that learn nothing, for a prompt that continues it."""
        return state

    def room(self, state: Any) -> int | None:
        """Tokens that the model can read at once in this state; None = any number."""
        return None

    def _pieces(self, idx: Tensor, state: Any) -> Sequence[Tensor]:
        """The tokens cut where fast weights are updated."""
        room = None if state is None else self.room(state)
        if room is None or idx.shape[1] <= room:
            return (idx,)
        period = self.config.fwpkm_chunk_size
        return (idx[:, :room], *idx[:, room:].split(period, dim=1))
