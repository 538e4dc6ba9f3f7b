"""Text, token by token: the prompt is read in parallel, then every token updates the state."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import check_seed
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.sampling.logits import SamplingOptions, draw, entropy, log_probs_of
from wavelet_lm.inference.sampling.random import uniforms
from wavelet_lm.json_files import brief

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer

# Random numbers that one token may take: plain sampling needs one, speculative sampling more.
NUMBERS_PER_TOKEN = 4


class NonFiniteOutput(UserError):
    """The model's logits are NaN or infinite, so that nothing can be drawn from them."""

    def __init__(self, n: int):
        super().__init__(
            f"the model's output is not finite (NaN or infinite logits) at token {n};"
            " its training diverged or its file is damaged: use another checkpoint"
        )


class Drawn(NamedTuple):
    """A token with its log-probability and the entropy there, both of the raw distribution (nats).

    Raw: the model's own, before penalties, temperature and cuts.
    """

    token: int
    log_prob: float
    entropy: float


class TopPSource(Protocol):
    """Where a top_p that changes on the way comes from, every `every` tokens, one per row."""

    every: int

    def top_p(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The top-p of each text for its next token, [B] float32; texts: the tokens so far."""


def sampled_tokens(
    decoder: Decoder,
    logits: Tensor,
    state: object,
    texts: Sequence[Sequence[int]],
    options: SamplingOptions,
    seeds: Sequence[int],
    top_p_source: TopPSource | None = None,
    seen: Sequence[Collection[int]] = (),
) -> Iterator[list[Drawn]]:
    """Continue B texts in step, for as long as the caller asks.

    On a GPU the next step is already running when the tokens of one are handed out.

    Args:
        logits, state: what `Decoder.prefill` returned for the texts; logits [B, V].
        texts: their tokens, which the repetition penalty counts as seen.
        seeds: one per row; a row draws the same numbers in any batch.
        top_p_source: looked at before tokens 0, `every`, 2 · `every`, …
        seen: for each row the tokens that its text held before those, where there were any.

    Yields:
        One `Drawn` per row.

    Raises:
        NonFiniteOutput: where a row's logits are.
    """
    texts = [list(text) for text in texts]
    sampler = Sampler(decoder, texts, options, seeds, top_p_source is not None, seen)
    session = decoder.start(state)
    step = decoder.accelerate(
        lambda: sampler.draw(session.decode(sampler.tokens)[:, -1]), (session, sampler)
    )
    run_ahead = decoder.device.type == "cuda"
    every = 0 if top_p_source is None else top_p_source.every
    unread: deque[Readout] = deque()
    n = n_read = 0
    while True:
        look = every > 0 and n % every == 0
        while len(unread) > (1 if run_ahead and not look else 0):
            drawn = unread.popleft().wait()
            n_read += 1
            if any(d.token < 0 for d in drawn):
                raise NonFiniteOutput(n_read)
            for text, d in zip(texts, drawn, strict=True):
                text.append(d.token)
            yield drawn
        if look:
            sampler.set_top_p(top_p_source.top_p(texts))
        if n == 0:
            sampler.draw(logits)
        else:
            step()
        unread.append(Readout(sampler.record))
        n += 1


class Sampler:
    """Draws a token for each row of a batch, without leaving the device.

    tokens: [B, 1] int64, the last ones drawn; record: [B, 3] float64, for each row the token
    (−1 where the logits were not finite), its log-probability and the entropy.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Sequence[int]],
        options: SamplingOptions,
        seeds: Sequence[int],
        moving_top_p: bool,
        seen: Sequence[Collection[int]] = (),
    ):
        B, device = len(texts), decoder.device
        self.options = options
        self.seeds = torch.tensor([check_seed(seed) for seed in seeds], device=device)
        self.count = torch.zeros(B, dtype=torch.int64, device=device)
        self.seen = seen_tokens(texts, decoder.vocab_size, device, seen)
        self.top_p = torch.full((B,), options.top_p, device=device) if moving_top_p else None
        self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.record = torch.zeros(B, 3, dtype=torch.float64, device=device)

    def buffers(self) -> list[Tensor]:
        """What `draw` changes in place, of any shapes."""
        return [self.count, self.seen, self.tokens, self.record]

    def set_top_p(self, top_p: Tensor) -> None:
        """Take other values of top-p, [B], from the next draw on."""
        self.top_p.copy_(top_p)

    def draw(self, logits: Tensor) -> None:
        """Draw from logits [B, V] and write `tokens` and `record`."""
        numbers = uniforms(self.seeds, NUMBERS_PER_TOKEN * self.count)
        tokens = draw(logits, self.seen, self.options, numbers, self.top_p)
        finite = logits.isfinite().all(-1)
        self.record.copy_(step_record(torch.where(finite, tokens, -1), tokens, logits))
        self.tokens.copy_(tokens[:, None])
        self.seen.scatter_(1, self.tokens, True)
        self.count.add_(1)


class Readout:
    """A record on its way to the host, behind the computation."""

    def __init__(self, record: Tensor):
        self._event = None
        if record.device.type == "cuda":
            self._host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
            self._host.copy_(record, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = record.clone()

    def wait(self) -> list[Drawn]:
        """One `Drawn` per row, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return [Drawn(int(token), p, h) for token, p, h in self._host.tolist()]


def step_record(codes: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """What `Drawn` holds of every row, [B, 3] float64.

    Args:
        codes: [B] int64, what stands for the token: itself, or a negative number in its place.
        tokens: [B] int64, the tokens; logits: [B, V], the model's own, that they were drawn from.
    """
    figures = (codes, log_probs_of(logits, tokens), entropy(logits))
    return torch.stack([figure.double() for figure in figures], dim=-1)


def seen_tokens(
    texts: Sequence[Sequence[int]],
    vocab_size: int,
    device: torch.device,
    before: Sequence[Collection[int]] = (),
) -> Tensor:
    """[B, V] bool: which tokens each text holds, or held `before`."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text, older in zip(seen, texts, before or [()] * len(texts), strict=True):
        row[torch.tensor([*text, *older], dtype=torch.int64)] = True
    return seen.to(device)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens that generation starts from; for an empty prompt `start_token`'s."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid Unicode text (UTF-8)") from None
    return tokenizer.encode(prompt) or [start_token(tokenizer)[0]]


def start_token(tokenizer: Tokenizer) -> tuple[int, str]:
    """Where a text without a prompt starts, as a token and in words.

    After an end-of-text; where the tokenizer has none, after a line break; where the vocabulary has
    no line break either, after its first entry.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text, "the end-of-text token"
    try:
        return tokenizer.encode("\n")[-1], "a line break"
    except UserError:  # a vocabulary of characters that lacks it
        return 0, f"the first entry of the vocabulary, {tokenizer.decode([0])!r}"


def check_vocabulary(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise `UserError` where a tokenizer is not the one that the model was trained with."""
    if not hasattr(tokenizer, "vocab_size"):
        raise UserError(
            f"the tokenizer is {brief(tokenizer)}; it must be the one of load_tokenizer"
        )
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model"
            f" {model.vocab_size}; keep a checkpoint in its own run folder"
        )


class TextStream:
    """Tokens to text as they come; a character split over several tokens appears once, whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, which may be empty."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)
