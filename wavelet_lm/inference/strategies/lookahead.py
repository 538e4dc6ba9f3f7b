"""Decoding that looks ahead: a token is chosen by the text that it leads to.

For every token of every row, each of the k likeliest candidates is continued greedily for `depth`
tokens; all candidates of all rows are one forked batch. One of them is drawn, the likelier its way
the more often; the rest of the roll-outs is forgotten, and the search starts again after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import check_seed
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import (
    NUMBERS_PER_TOKEN,
    Drawn,
    NonFiniteOutput,
    Readout,
    TopPSource,
    seen_tokens,
    step_record,
)
from wavelet_lm.inference.sampling.logits import (
    SamplingOptions,
    adaptive_temperature,
    adjusted,
    apply_temperature,
    draw_from,
    penalize,
    widened,
)
from wavelet_lm.inference.sampling.random import uniforms


def lookahead_tokens(
    decoder: Decoder,
    logits: Tensor,
    state: Any,
    texts: Sequence[Sequence[int]],
    options: SamplingOptions,
    seeds: Sequence[int],
    k: int,
    depth: int,
    top_p_source: TopPSource | None = None,
    seen: Sequence[Collection[int]] = (),
) -> Iterator[list[Drawn]]:
    """Continue B texts in step, for as long as the caller asks.

    The candidates of a row are the k likeliest of the tokens that `options` leave. With q the
    model's distribution after the repetition penalty (each roll-out counts its own tokens as seen)
    a candidate c scores

        log q(c) + 1/(depth + 1) · Σ_{i=1}^{depth} max_x log q(x | c and the i − 1 tokens after it)

    which is its own log-probability plus depth/(depth + 1) times the mean of its roll-out's.
    Where the options are greedy the highest score wins, among equal ones that of the likelier
    candidate. Otherwise the candidate is drawn from softmax(score / T), T the temperature of this
    token, with the row's own number. So depth = 0 is sampling among the k likeliest, and k = 1
    takes the likeliest token.

    Args:
        logits, state: what `Decoder.prefill` returned for the texts, [B, V].
        texts: their tokens, which the repetition penalty counts as seen.
        seeds: one per row; a row draws the same numbers in any batch.
        k: candidates, 1 or more (beyond V: all tokens).
        depth: tokens that each is continued by, 0 or more.
        top_p_source: looked at before tokens 0, `every`, 2 · `every`, …
        seen: for each row the tokens that its text held before those, where there were any.

    Yields:
        One `Drawn` per row.

    Raises:
        UserError: k or depth out of range.
        NonFiniteOutput: where a row's logits, or those of a roll-out, are.
    """
    for name, value, least in (("lookahead_k", k, 1), ("lookahead_depth", depth, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")
    texts = [list(text) for text in texts]
    search = Search(decoder, texts, options, seeds, min(k, decoder.vocab_size), depth, seen)
    forked = [row for row in range(len(texts)) for _ in range(search.k)]
    session = decoder.start(state)
    if depth > 0:
        forks = decoder.start(decoder.rows(state, forked))
        step = decoder.accelerate(
            lambda: search.extend(forks.decode(search.tokens)[:, -1]), (forks, search)
        )
    n = 0
    while True:
        if top_p_source is not None and n % top_p_source.every == 0:
            search.top_p = top_p_source.top_p(texts)
        search.begin(logits)
        if depth > 0:
            if n > 0:
                now = session.state()
                if decoder.adapts:  # fast weights grow; `load` is for states of one size
                    forks = decoder.start(decoder.rows(now, forked))
                else:
                    forks.load(now, forked)
            for _ in range(depth):
                step()
        search.choose(logits)
        drawn = Readout(search.record).wait()
        n += 1
        if any(one.token < 0 for one in drawn):
            raise NonFiniteOutput(n)
        for text, one in zip(texts, drawn, strict=True):
            text.append(one.token)
        yield drawn
        logits = session.decode(search.chosen)[:, -1]


class Search:
    """k continuations of each of B texts and their scores, which never leave the device.

    Attributes:
        k: continuations of a text; those of one text stand side by side in a batch of B · k.
        top_p: [B] in place of that of the options, where it moves.
        tokens: [B · k, 1] int64, the newest of each continuation.
        chosen: [B, 1] int64, the token that each text goes on with.
        record: [B, 3] float64, for each row `chosen` (−1 where logits were not finite), its
            log-probability and the entropy.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Sequence[int]],
        options: SamplingOptions,
        seeds: Sequence[int],
        k: int,
        depth: int,
        seen: Sequence[Collection[int]] = (),
    ):
        B, V, device = len(texts), decoder.vocab_size, decoder.device
        self.k, self.options, self.top_p = k, options, None
        self._share = 1 / (depth + 1)
        self._seeds = torch.tensor([check_seed(seed) for seed in seeds], device=device)
        self._count = torch.zeros(B, dtype=torch.int64, device=device)
        self._text_seen = seen_tokens(texts, V, device, seen)
        self._seen = torch.zeros(B * k, V, dtype=torch.bool, device=device)
        self._candidates = torch.zeros(B, k, dtype=torch.int64, device=device)
        self._scores = torch.zeros(B, k, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(B * k, 1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.record = torch.zeros(B, 3, dtype=torch.float64, device=device)

    def buffers(self) -> list[Tensor]:
        """What `extend` changes in place, of any shapes."""
        return [self._scores, self._seen, self.tokens]

    def begin(self, logits: Tensor) -> None:
        """Start from the k likeliest tokens of logits [B, V] that the options leave."""
        allowed = adjusted(logits, self._text_seen, self.options, self.top_p)
        # A stable sort, since among equals topk prefers none: the first is what argmax takes.
        allowed, candidates = allowed.sort(descending=True, stable=True)
        self._candidates.copy_(candidates[:, : self.k])
        log_q = self._log_q(logits, self._text_seen).gather(1, self._candidates).double()
        # Where the options leave fewer than k, excluded tokens fill the batch.
        excluded = allowed[:, : self.k] == -torch.inf
        self._scores.copy_(log_q.masked_fill(excluded, -torch.inf))
        self.tokens.copy_(self._candidates.view(-1, 1))
        self._seen.copy_(self._text_seen.repeat_interleave(self.k, 0))
        self._seen.scatter_(1, self.tokens, True)

    def extend(self, logits: Tensor) -> None:
        """Continue each by its likeliest token; logits [B · k, V] are those after `tokens`."""
        best, tokens = self._log_q(logits, self._seen).max(-1, keepdim=True)
        # The score of an excluded token stays −∞ whatever follows it. Elsewhere NaN marks that the
        # model failed.
        failed = ~logits.isfinite().all(-1)
        gain = self._share * best[:, 0].double().masked_fill(failed, torch.nan).view(-1, self.k)
        excluded = self._scores == -torch.inf
        self._scores.copy_(torch.where(excluded, self._scores, self._scores + gain))
        self.tokens.copy_(tokens)
        self._seen.scatter_(1, tokens, True)

    def choose(self, logits: Tensor) -> None:
        """Write `chosen` and `record`, for the logits [B, V] that the search began with."""
        if self.options.greedy:  # the first, the likeliest, of equals
            best = self._scores.argmax(-1, keepdim=True)
            tokens = self._candidates.gather(1, best)[:, 0]
        else:
            temperature: float | Tensor = self.options.temperature
            if self.options.entropy_adaptive:
                temperature = adaptive_temperature(widened(logits), self.options)[:, None]
            # In the order of the vocabulary, as sampling without a search draws.
            p = apply_temperature(self._scores, temperature).softmax(-1)
            p = p.new_zeros(logits.shape).scatter(1, self._candidates, p)
            tokens = draw_from(p, uniforms(self._seeds, NUMBERS_PER_TOKEN * self._count))
        finite = logits.isfinite().all(-1) & ~self._scores.isnan().any(-1)
        self.record.copy_(step_record(torch.where(finite, tokens, -1), tokens, logits))
        self.chosen.copy_(tokens[:, None])
        self._text_seen.scatter_(1, self.chosen, True)
        self._count.add_(1)

    def _log_q(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Log-probabilities after the repetition penalty, as long as logits [·, V]."""
        return penalize(widened(logits), seen, self.options.repetition_penalty).log_softmax(-1)
