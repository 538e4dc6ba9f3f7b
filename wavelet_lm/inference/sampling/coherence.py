"""Keeping to the topic: top_p narrows as the text drifts away from its prompt.

The topic of a text is its fingerprint, the mean over its positions of the causal, undecimated Haar
approximation (`transforms/haar.py`) of its token embeddings. Drift is 1 − the cosine between the
prompt's fingerprint and that of the last tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wavelet_lm.config.option import option
from wavelet_lm.config.run import LARGEST
from wavelet_lm.inference.checks import check_fields

if TYPE_CHECKING:
    from wavelet_lm.inference.decoder import TokenVectors

# However far a text has drifted, top_p stays at least this, or what it was if that is less.
LOWEST_TOP_P = 0.3

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class CoherenceOptions:
    """How far top_p falls as a text leaves its prompt's topic."""

    weight: float = option(0.5, "what a drift of 1 takes off top_p", minimum=0, maximum=LARGEST)
    window: int = option(64, "last tokens that are compared with the prompt", minimum=1)
    levels: int = option(
        3, "of the Haar approximation of the token embeddings", minimum=0, maximum=30
    )

    def __post_init__(self) -> None:
        check_fields(self, "the {} of wavelet_coherence")


class WaveletCoherence:
    """The top_p of every row of a batch, from its drift.

    Args:
        embedding: the token embeddings: [V, C], or what gives those of tokens likewise.
        prompts: one per row, 1 or more tokens each.
        top_p: without drift.
        weight: what a drift of 1 takes off top_p.
        window: how many of the last tokens are compared with the prompt.
        levels: of the Haar approximation, which sums over 2^levels tokens.

    Attributes:
        every: after how many tokens to look again; top_p holds in between.

    Raises:
        UserError: weight, window or levels out of range.
    """

    every = 16

    def __init__(
        self,
        embedding: Tensor | TokenVectors,
        prompts: Texts,
        top_p: float,
        weight: float = CoherenceOptions.weight,
        window: int = CoherenceOptions.window,
        levels: int = CoherenceOptions.levels,
    ):
        CoherenceOptions(weight, window, levels)  # checks its values
        self.embedding = embedding
        self.full_top_p, self.weight, self.window, self.levels = top_p, weight, window, levels
        self.topics = fingerprints(self.embedding, prompts, levels)

    def top_p(self, texts: Texts) -> Tensor:
        """top_p − weight · drift, but at least `LOWEST_TOP_P`: [B] for texts of 1 or more tokens.

        A text is everything so far, the prompt included.
        """
        lowest = min(LOWEST_TOP_P, self.full_top_p)
        return (self.full_top_p - self.weight * self.drift(texts)).clamp(min=lowest)

    def drift(self, texts: Texts) -> Tensor:
        """How far the last `window` tokens of each text are from its prompt: [B] in 0 … 2.

        A fingerprint of zeros has no direction; nothing drifts from it or to it.
        """
        recent = [text[-self.window :] for text in texts]
        now = fingerprints(self.embedding, recent, self.levels)
        norms = self.topics.norm(dim=-1) * now.norm(dim=-1)
        cosine = (self.topics * now).sum(-1) / norms
        return torch.where(norms > 0, (1 - cosine).clamp(0, 2), 0)


@torch.no_grad()
def fingerprints(embedding: Tensor | TokenVectors, texts: Texts, levels: int) -> Tensor:
    """Mean Haar approximation of each text's embeddings: [B, C], float32 at least.

    The approximation at t is 2^(−levels/2) times the sum of the 2^levels embeddings that end at t,
    so that position s of a text of T counts min(2^levels, T − s) times in the mean over t.
    """
    reach, device = 2**levels, embedding.device
    # Only the rows that are used are read and widened, each once.
    used, tokens = torch.cat([torch.tensor(list(text)) for text in texts]).unique(
        return_inverse=True
    )
    table = embedding[used.to(device)]
    table = table if table.dtype == torch.float64 else table.float()
    lengths = torch.tensor([len(text) for text in texts])
    shares = [
        torch.arange(T, 0, -1, dtype=table.dtype).clamp(max=reach) / T for T in lengths.tolist()
    ]
    sums = torch.nn.functional.embedding_bag(
        tokens.to(device),
        table,
        (lengths.cumsum(0) - lengths).to(device),
        mode="sum",
        per_sample_weights=torch.cat(shares).to(device),
    )
    return sums / math.sqrt(reach)
