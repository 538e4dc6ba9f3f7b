"""Speculative decoding: a small model drafts tokens, the large one reads several of them at once.

Leviathan, Kalman and Matias, 2023, "Fast inference from transformers via speculative decoding", and
Chen et al., 2023, "Accelerating large language model decoding with speculative sampling". With p
the target's distribution and q the draft's, a drafted token x is kept with probability
min(1, p(x) / q(x)); the first that is not is drawn again from max(p − q, 0), normalised. The text
is then distributed as the target's own; only the speed depends on the draft.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    draw,
    draw_from,
    probabilities,
)
from wavelet_lm.inference.sampling.random import uniforms

# Which of a token's random numbers decides what: the target's own draw, the draft's, acceptance.
FINAL, DRAFTED, ACCEPTED = range(3)
# What a record holds in place of a token: logits that were not finite, or nothing at all.
TARGET_FAILED, DRAFT_FAILED, UNUSED = -1, -2, -3


@dataclass
class Counts:
    """Tokens that the draft proposed, and those of them that were kept, so far."""

    proposed: int = 0
    accepted: int = 0


class NonFiniteDraft(UserError):
    """The draft model's logits are NaN or infinite."""

    def __init__(self, n: int):
        super().__init__(
            f"the draft model's output is not finite (NaN or infinite logits) at token {n};"
            " its training diverged or its file is damaged: use another draft"
        )


def speculative_tokens(
    target: Decoder,
    draft: Decoder,
    text: Sequence[int],
    target_start: tuple[Tensor, Any],
    draft_start: tuple[Tensor, Any],
    options: SamplingOptions,
    seed: int,
    gamma: int,
    counts: Counts | None = None,
    top_p_source: TopPSource | None = None,
    seen: Sequence[Collection[int]] = (),
) -> Iterator[Drawn]:
    """Continue one text for as long as the caller asks, up to gamma + 1 tokens per round.

    Greedy options give the target's greedy text. Others give a text of the same distribution as
    plain sampling with these options, not the same text; the same seed repeats it. Both models'
    distributions are adjusted by the options, each token with the tokens before it as seen.

    Args:
        target, draft: models of the same vocabulary on the same device.
        text: tokens so far, which the repetition penalty counts as seen.
        target_start, draft_start: what `prefill` of each returned for the text: logits [1, V] and
            the state.
        gamma: tokens that the draft proposes in each round, 1 or more.
        counts: is added to as tokens are verified.
        top_p_source: looked at before tokens 0, `every`, 2 · `every`, …: a round ends there at the
            latest, so that the text keeps its distribution.
        seen: one element, the tokens that the text held before those, or none.

    Raises:
        UserError: the models do not fit each other, gamma or seed are out of range.
        NonFiniteOutput, NonFiniteDraft: at the first token that a model failed at.
    """
    if gamma < 1:
        raise UserError(f"gamma is {gamma}; it must be 1 or more")
    if draft.vocab_size != target.vocab_size:
        raise UserError(
            f"the draft model has {draft.vocab_size} tokens and the model {target.vocab_size};"
            " both must have been trained with the same tokenizer"
        )
    counts = Counts() if counts is None else counts
    numbers = Numbers(seed, target.device)
    moving = top_p_source is not None
    proposals = Proposals(draft, options, numbers, gamma, moving)
    so_far = TextSoFar(text, target, moving, seen)
    verdict = Verdict(target, options, numbers, gamma)
    whole = list(text)
    reader = target.start(target_start[1], max_step=gamma + 1)
    writer = draft.start(draft_start[1], max_step=gamma)

    def propose() -> None:
        """The draft reads the newest token, and draws the next proposal."""
        logits = writer.decode(proposals.newest)
        proposals.add(logits[:, -1])

    def verify() -> None:
        """The target reads the last token of the text and the proposals; the text grows."""
        unread = torch.cat((so_far.newest, proposals.tokens[:, :gamma]), 1)
        so_far.grow(verdict.on(reader.decode(unread)[0], so_far, proposals))

    # What a step changes is told to `accelerate`, since it may run more often than it counts.
    propose = draft.accelerate(propose, (writer, proposals))
    verify = target.accelerate(verify, (reader, so_far, verdict))

    # The first token needs no reading; from then on a round starts with one that neither has read.
    if moving:
        so_far.look(top_p_source.top_p([whole]), top_p_source.every)
    so_far.grow(verdict.on_first(target_start[0], so_far))
    drawn, n = verdict.read(), 0
    while True:
        for one in drawn:
            n += 1
            if one.token == TARGET_FAILED:
                raise NonFiniteOutput(n)
            if one.token == DRAFT_FAILED:
                raise NonFiniteDraft(n)
            whole.append(one.token)
            yield one
        if moving and n % top_p_source.every == 0:
            so_far.look(top_p_source.top_p([whole]), top_p_source.every)
        proposals.begin(so_far)
        for _ in range(gamma):
            propose()
        verify()
        drawn = verdict.read()
        n_kept = len(drawn) - 1
        counts.proposed += gamma
        counts.accepted += n_kept
        reader.rollback(gamma - n_kept)
        if n_kept == gamma:
            propose()  # for its reading: the last proposal is the one that the draft has not read
        else:
            writer.rollback(gamma - 1 - n_kept)


class Numbers:
    """The random numbers of one seed, by token and purpose.

    A proposal that is thrown away leaves its numbers to the one that takes its place. That does no
    harm: what was kept before them did not depend on them.
    """

    def __init__(self, seed: int, device: torch.device):
        self._seed = torch.tensor([check_seed(seed)], device=device)

    def __call__(self, n: Tensor, purpose: int) -> Tensor:
        """[T] float64 in [0, 1) for the tokens numbered n [T]."""
        return uniforms(self._seed, NUMBERS_PER_TOKEN * n + purpose)


class Proposals:
    """What the draft proposes in one round, and what it drew from.

    Of each buffer the last place is filled only where all proposals were kept, and never read.

    Attributes:
        newest: [1, 1] int64, the token to read next.
        tokens: [1, gamma + 1] int64.
        probabilities: [gamma + 1, V] float64.
        finite: [gamma + 1] bool, whether the logits were.
    """

    def __init__(
        self,
        decoder: Decoder,
        options: SamplingOptions,
        numbers: Numbers,
        gamma: int,
        moving_top_p: bool,
    ):
        V, device = decoder.vocab_size, decoder.device
        self._options, self._numbers = options, numbers
        self.newest = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(1, gamma + 1, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(gamma + 1, V, dtype=torch.float64, device=device)
        self.finite = torch.zeros(gamma + 1, dtype=torch.bool, device=device)
        self._seen = torch.zeros(1, V, dtype=torch.bool, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)  # number of tokens[:, 0]
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._top_p = torch.ones(1, device=device) if moving_top_p else None

    def buffers(self) -> list[Tensor]:
        """What `add` changes in place, of any shapes."""
        return [
            *(self.newest, self.tokens, self.probabilities, self.finite),
            *(self._seen, self._place),
        ]

    def begin(self, text: TextSoFar) -> None:
        """Start where the text is now."""
        self.newest.copy_(text.newest)
        self._seen.copy_(text.seen)
        self._first.copy_(text.count)
        self._place.zero_()
        if self._top_p is not None:
            self._top_p.copy_(text.top_p)

    def add(self, logits: Tensor) -> None:
        """Draw from logits [1, V]."""
        numbers = self._numbers(self._first + self._place, DRAFTED)
        if self._options.greedy:
            token = draw(logits, self._seen, self._options, numbers)
        else:
            p = probabilities(logits, self._seen, self._options, self._top_p)
            token = draw_from(p, numbers)
            self.probabilities.index_copy_(0, self._place, p.double())
        self.newest.copy_(token[:, None])
        self.tokens.index_copy_(1, self._place, self.newest)
        self.finite.index_copy_(0, self._place, logits.isfinite().all(-1))
        self._seen.scatter_(1, self.newest, True)
        # The remainder, since a step that warms up runs more often than there are places.
        self._place.copy_((self._place + 1) % self.tokens.shape[1])


class Growth(NamedTuple):
    """What a round adds to the text.

    Attributes:
        tokens: [gamma + 1] int64, those of the round; from place `n_kept` on all are `newest`.
        n_kept: [1] int64, how many of them were proposed.
        newest: [1] int64, the one that follows those.
    """

    tokens: Tensor
    n_kept: Tensor
    newest: Tensor


class TextSoFar:
    """The text, as far as the next round needs to know it.

    Attributes:
        newest: [1, 1] int64, the last token, which no model has read.
        seen: [1, V] bool, the tokens in the text.
        count: [1] int64, the tokens generated.
        top_p: [1], in place of that of the options, where it moves; None where it does not.
        next_look: [1] int64, the number of the token that the next look at top_p comes before.
    """

    def __init__(
        self,
        text: Sequence[int],
        decoder: Decoder,
        moving_top_p: bool,
        seen: Sequence[Collection[int]] = (),
    ):
        device = decoder.device
        self.newest = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.seen = seen_tokens([text], decoder.vocab_size, device, seen)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(1, device=device) if moving_top_p else None
        self.next_look = torch.zeros_like(self.count)

    def buffers(self) -> list[Tensor]:
        """What `grow` changes in place, of any shapes."""
        return [self.newest, self.seen, self.count]

    def look(self, top_p: Tensor, every: int) -> None:
        """Hold this top_p, [1], for the next `every` tokens."""
        self.top_p.copy_(top_p)
        self.next_look.copy_(self.count + every)

    def grow(self, growth: Growth) -> None:
        """Take what a round adds."""
        self.newest.copy_(growth.newest[:, None])
        self.seen.scatter_(1, growth.tokens[None], True)
        self.count.add_(growth.n_kept + 1)


class Verdict:
    """What the target says to the proposals of a round; it changes nothing but its record.

    record: [gamma + 1, 3] float64, for each token of the round what `Drawn` holds.
    """

    def __init__(self, decoder: Decoder, options: SamplingOptions, numbers: Numbers, gamma: int):
        device = decoder.device
        self._options, self._numbers = options, numbers
        self._places = torch.arange(gamma + 1, device=device)
        self.record = torch.zeros(gamma + 1, 3, dtype=torch.float64, device=device)

    def buffers(self) -> list[Tensor]:
        """What `on` changes in place, of any shapes."""
        return [self.record]

    def on_first(self, logits: Tensor, text: TextSoFar) -> Growth:
        """One token drawn from logits [1, V], without a proposal."""
        number = self._numbers(text.count, FINAL)
        token = draw(logits, text.seen, self._options, number, text.top_p)
        tokens = token.expand(len(self._places))
        growth = Growth(tokens, torch.zeros_like(text.count), token)
        self._write(growth, logits.expand(len(tokens), -1), tokens >= 0)
        return growth

    def on(self, logits: Tensor, text: TextSoFar, proposals: Proposals) -> Growth:
        """The proposals up to the first that is rejected, and a token of the target's own.

        logits: [gamma + 1, V], of the target before each proposal and after the last.
        """
        drafted = proposals.tokens[0, :-1]
        accepted, final = self._judge(logits, text, drafted, proposals)
        n_kept = accepted.long().cumprod(0).sum(0, keepdim=True)
        newest = final[n_kept]
        if text.top_p is not None:
            # Of more tokens than may come before the next look the last is a proposal that was
            # accepted; what follows it is proposed again.
            last = text.next_look - text.count - 1
            drafted_last = proposals.tokens[0][last.clamp(max=len(drafted))]
            newest = torch.where(n_kept > last, drafted_last, newest)
            n_kept = torch.minimum(n_kept, last)
        tokens = torch.where(self._places < n_kept, proposals.tokens[0], newest)
        growth = Growth(tokens, n_kept, newest)
        # The token after the last proposal is the target's alone.
        self._write(growth, logits, proposals.finite | (self._places == len(drafted)))
        return growth

    def _judge(
        self, logits: Tensor, text: TextSoFar, drafted: Tensor, proposals: Proposals
    ) -> tuple[Tensor, Tensor]:
        """Whether each proposal is accepted [gamma], and what stands in its place if not.

        The second is [gamma + 1]: its last entry is the token after all proposals.
        """
        rows = [text.seen]
        for token in drafted.split(1):
            rows.append(rows[-1].scatter(1, token[:, None], True))
        seen, n = torch.cat(rows), text.count + self._places
        if self._options.greedy:
            final = draw(logits, seen, self._options, self._numbers(n, FINAL))
            return final[:-1] == drafted, final
        p = probabilities(logits, seen, self._options, text.top_p).double()
        q = proposals.probabilities[:-1]
        chosen = drafted[:, None]
        accepted = (
            self._numbers(n[:-1], ACCEPTED) * q.gather(1, chosen)[:, 0]
            < p[:-1].gather(1, chosen)[:, 0]
        )
        rest = torch.cat(((p[:-1] - q).clamp(min=0), p[-1:]))
        # Where p equals q but for rounding, nothing may be left; p is then what rest stands for.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        return accepted, draw_from(rest, self._numbers(n, FINAL))

    def _write(self, growth: Growth, logits: Tensor, draft_finite: Tensor) -> None:
        """Keep on record what is added, of the target's logits [gamma + 1, V]."""
        codes = torch.where(draft_finite, growth.tokens, DRAFT_FAILED)
        codes = torch.where(logits.isfinite().all(-1), codes, TARGET_FAILED)
        codes = torch.where(self._places <= growth.n_kept, codes, UNUSED)
        self.record.copy_(step_record(codes, growth.tokens, logits))

    def read(self) -> list[Drawn]:
        """The tokens of the round, on the host: the only thing that it waits for."""
        return [drawn for drawn in Readout(self.record).wait() if drawn.token != UNUSED]
