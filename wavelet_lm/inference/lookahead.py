"""Greedy decoding that looks ahead: a token is chosen by the text that it leads to.

For every token, each of the k likeliest candidates is continued greedily for `depth` tokens, all of
them as one forked batch. The candidate whose continuation is likeliest as a whole is taken; the
rest of the continuation is forgotten, and the search starts again after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.errors import UserError
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import Drawn, NonFiniteOutput, Readout, seen_tokens
from wavelet_lm.inference.sampling import SamplingOptions, adjusted, entropy, log_probs_of


def lookahead_tokens(
    decoder: Decoder,
    logits: Tensor,
    state: Any,
    text: Sequence[int],
    options: SamplingOptions,
    k: int,
    depth: int,
) -> Iterator[Drawn]:
    """Continue one text for as long as the caller asks.

    With p the distribution that `options` make of the model's (penalty, temperature, cuts; each
    rollout counts its own tokens as seen), a candidate c scores

        log p(c) + Σ_{i=1}^{depth} max_x log p(x | c and its i − 1 tokens after it)

    and the highest score wins, among equal ones that of the likelier candidate. Tokens that the
    options exclude are no candidates. Nothing is random; k = 1 or depth = 0 is greedy decoding.

    Args:
        logits, state: what `Decoder.prefill` returned for the text, [1, V].
        text: its tokens, which the repetition penalty counts as seen.
        k: candidates, 1 or more (beyond V: all tokens).
        depth: tokens that each is continued by, 0 or more.

    Raises:
        UserError: k or depth out of range.
        NonFiniteOutput: where the text's logits, or those of a rollout, are.
    """
    for name, value, least in (("lookahead_k", k, 1), ("lookahead_depth", depth, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")
    search = Search(decoder, text, options, min(k, decoder.vocab_size))
    every = [0] * search.k
    session = decoder.start(state)
    if depth > 0:
        forks = decoder.start(decoder.rows(state, every))
        step = decoder.accelerate(
            lambda: search.extend(forks.decode(search.tokens)[:, -1]), (forks, search)
        )
    n = 0
    while True:
        search.begin(logits)
        if depth > 0:
            if n > 0:
                now = session.state()
                if decoder.adapts:  # fast weights grow; `load` is for states of one size
                    forks = decoder.start(decoder.rows(now, every))
                else:
                    forks.load(now, every)
            for _ in range(depth):
                step()
        search.choose(logits)
        (drawn,) = Readout(search.record).wait()
        n += 1
        if drawn.token < 0:
            raise NonFiniteOutput(n)
        yield drawn
        logits = session.decode(search.chosen)[:, -1]


class Search:
    """k continuations of a text and their scores, which never leave the device.

    Attributes:
        k: their number.
        tokens: [k, 1] int64, the newest of each.
        chosen: [1, 1] int64, the first token of the best one.
        record: [1, 3] float64: `chosen` (−1 where logits were not finite), its log-probability and
            the entropy.
    """

    def __init__(self, decoder: Decoder, text: Sequence[int], options: SamplingOptions, k: int):
        device = decoder.device
        self.k, self.options = k, options
        self._text_seen = seen_tokens([text], decoder.vocab_size, device)
        self._seen = self._text_seen.repeat(k, 1)
        self._candidates = torch.zeros(k, dtype=torch.int64, device=device)
        self._scores = torch.zeros(k, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(k, 1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.record = torch.zeros(1, 3, dtype=torch.float64, device=device)

    def buffers(self) -> list[Tensor]:
        """What `extend` changes in place."""
        return [self._scores, self._seen, self.tokens]

    def begin(self, logits: Tensor) -> None:
        """Start from the k likeliest tokens of logits [1, V]."""
        log_probs = adjusted(logits, self._text_seen, self.options).log_softmax(-1)[0]
        # A stable sort, since among equals topk prefers none: the first is what argmax takes.
        scores, candidates = log_probs.sort(descending=True, stable=True)
        self._scores.copy_(scores[: self.k])
        self._candidates.copy_(candidates[: self.k])
        self.tokens.copy_(self._candidates[:, None])
        self._seen.copy_(self._text_seen.expand(self.k, -1))
        self._seen.scatter_(1, self.tokens, True)

    def extend(self, logits: Tensor) -> None:
        """Continue each by its likeliest token; logits [k, V] are those after `tokens`."""
        log_probs = adjusted(logits, self._seen, self.options).log_softmax(-1)
        best, tokens = log_probs.max(-1, keepdim=True)
        # An excluded token fills the batch where the options leave fewer than k: its score stays
        # −∞ whatever follows it. Elsewhere NaN marks that the model failed.
        failed = ~logits.isfinite().all(-1)
        gain = best[:, 0].double().masked_fill(failed, torch.nan)
        excluded = self._scores == -torch.inf
        self._scores.copy_(torch.where(excluded, self._scores, self._scores + gain))
        self.tokens.copy_(tokens)
        self._seen.scatter_(1, tokens, True)

    def choose(self, logits: Tensor) -> None:
        """Write `chosen` and `record`, for the logits [1, V] that the search began with."""
        token = self._candidates[self._scores.argmax()][None]  # the first, the likeliest, of equals
        finite = logits.isfinite().all(-1) & ~self._scores.isnan().any()
        figures = (torch.where(finite, token, -1), log_probs_of(logits, token), entropy(logits))
        self.record.copy_(torch.stack([figure.double() for figure in figures], dim=-1))
        self.chosen.copy_(token[:, None])
        self._text_seen.scatter_(1, self.chosen, True)
