"""Text, token by token: the prompt is read in parallel, then every token updates the state."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wavelet_lm.devices import reading
from wavelet_lm.errors import UserError
from wavelet_lm.inference.sampling import SamplingOptions, draw

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer

# Positions of the prompt that are read at once: what bounds the memory that a long prompt needs.
PREFILL_POSITIONS = 4096
MAX_SEED = 2**63 - 1


class NonFiniteOutput(UserError):
    """The model's logits are NaN or infinite, so that nothing can be drawn from them."""


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 64,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    ignore_eot: bool = False,
) -> str:
    """Continue `prompt`; returns the new text only, without the prompt.

    It ends after `num_tokens` tokens, or where the model ends the text (end-of-text token) unless
    `ignore_eot`. The same seed on the same device gives the same text. Raises `UserError` for
    options out of range, a prompt that the tokenizer cannot encode, and output that is not finite.
    """
    options = SamplingOptions(temperature, top_k, top_p, repetition_penalty)
    stop = None if ignore_eot else tokenizer.end_of_text
    text = TextStream(tokenizer)
    tokens = stream_tokens(model, encode_prompt(tokenizer, prompt), num_tokens, options, seed, stop)
    return "".join(map(text.feed, tokens)) + text.finish()


def stream_tokens(
    model: nn.Module,
    prompt_ids: Sequence[int],
    num_tokens: int,
    options: SamplingOptions,
    seed: int,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to `num_tokens` tokens that follow the prompt, each as soon as it is drawn.

    Args:
        model: `model(idx, state, last_only=True) -> logits [1, 1, V], state`.
        prompt_ids: at least one token.
        seed: of the generator that draws, which is this stream's own.
        stop_token: ends the stream when drawn, and is not yielded.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; it must be between 0 and {MAX_SEED}")
    if num_tokens < 1:
        return
    idx = torch.tensor([list(prompt_ids)], device=next(model.parameters()).device)
    generator = torch.Generator(idx.device).manual_seed(seed)
    logits, state = prefill(model, idx)
    state = model.adapting(state)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, idx, True)
    for n in range(num_tokens):
        if n > 0:
            logits, state = advance(model, idx, state)
        if not logits.isfinite().all():
            raise NonFiniteOutput(
                f"the model's output is not finite (NaN or infinite logits) at token {n + 1};"
                " its training diverged or its file is damaged: use another checkpoint"
            )
        idx = draw(logits, seen, options, generator)[:, None]
        seen.scatter_(1, idx, True)
        token = int(idx)
        if token == stop_token:
            return
        yield token


def prefill(model: nn.Module, idx: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Read a text [B, T] in chunks of bounded size: next-token logits [B, V] and the state."""
    for chunk in idx.split(PREFILL_POSITIONS, dim=1):
        logits, state = advance(model, chunk, state)
    return logits, state


def advance(model: nn.Module, idx: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read the next tokens [B, T]: next-token logits [B, V] and the state after them."""
    with reading(model):
        logits, state = model(idx, state, last_only=True)
        return logits[:, -1], state


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
