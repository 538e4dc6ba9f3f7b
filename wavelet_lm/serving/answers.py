"""What is answered, as the objects of the interface."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

from wavelet_lm.data.tokenizer_base import Tokenizer
from wavelet_lm.inference.generation import Drawn
from wavelet_lm.scope.scope import token_text
from wavelet_lm.serving.job import Alternatives, Written

REASONS = {"end_of_text": "stop"}  # all others have their own names
DONE = b"data: [DONE]\n\n"


class Answer:
    """The answer to one request, whole or in events.

    Args:
        kind: `text_completion` or `chat.completion`.
        model: the served name.
        tokenizer: turns tokens into text.
        figures: whether tokens are told with their log-probabilities.
    """

    def __init__(self, kind: str, model: str, tokenizer: Tokenizer, figures: bool):
        self.is_chat = kind != "text_completion"
        self._tokenizer, self._figures = tokenizer, figures
        self._kind = kind
        self._head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + f"{random.getrandbits(96):024x}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}

    def event(self, index: int, written: Sequence[Written], **extra: Any) -> bytes:
        """An event with what was written of one choice since the last one."""
        text = "".join(one.piece for one in written)
        choice = {"index": index, "finish_reason": _reason(written[-1].reason if written else None)}
        if self.is_chat:
            delta = {"content": text}
            if index not in self._offsets:
                self._offsets[index] = 0
                delta["role"] = "assistant"
            choice["delta"] = delta
        else:
            choice["text"] = text
        choice["logprobs"] = self._figures_of(index, written)
        return sse({**self._events_head(), "choices": [{**choice, **extra}]})

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The last event of a stream, where it is asked for."""
        return sse({**self._events_head(), "choices": [], "usage": usage})

    def choice(self, index: int, text: str, written: Sequence[Written], **extra: Any) -> Any:
        """A whole choice; written: all of it, whose last element says why it ends."""
        said = (
            {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        )
        return {
            "index": index,
            **said,
            "finish_reason": _reason(written[-1].reason if written else "length"),
            "logprobs": self._figures_of(index, written),
            **extra,
        }

    def body(self, choices: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        return {**self._head, "choices": choices, "usage": usage}

    def _events_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else self._kind
        return {**self._head, "object": kind}

    def prompt(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What is said of a prompt whose tokens are asked for; bytes that are no text in hex."""
        texts = [token_text(self._tokenizer.token_bytes(token)) for token in tokens]
        return {"prompt_token_ids": list(tokens), "prompt_tokens": texts}

    # --- figures of tokens -----------------------------------------------------------------------

    def _figures_of(self, index: int, written: Sequence[Written]) -> dict[str, Any] | None:
        if not self._figures:
            return None
        tokens = [(one.drawn, one.alternatives) for one in written if one.drawn is not None]
        return self._chat_figures(tokens) if self.is_chat else self._text_figures(index, tokens)

    def _chat_figures(self, tokens: Sequence[tuple[Drawn, Alternatives]]) -> dict[str, Any]:
        def told(token: int, log_prob: float) -> dict[str, Any]:
            log_prob = _finite(log_prob)
            as_bytes = self._tokenizer.token_bytes(token)
            text = as_bytes.decode(errors="replace")
            return {"token": text, "logprob": log_prob, "bytes": list(as_bytes)}

        content = [
            {
                **told(drawn.token, drawn.log_prob),
                "top_logprobs": [told(*each) for each in alternatives],
                "entropy": drawn.entropy,
                "id": drawn.token,
            }
            for drawn, alternatives in tokens
        ]
        return {"content": content, "refusal": None}

    def _text_figures(
        self, index: int, tokens: Sequence[tuple[Drawn, Alternatives]]
    ) -> dict[str, Any]:
        texts = [self._text(drawn.token) for drawn, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        top = [
            [{"id": i, "token": self._text(i), "logprob": _finite(p)} for i, p in alternatives]
            for _, alternatives in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(drawn.log_prob) for drawn, _ in tokens],
            # By text, of which two tokens may share one: the likelier stands.
            "top_logprobs": [{one["token"]: one["logprob"] for one in reversed(t)} for t in top],
            "text_offset": offsets,
            "token_ids": [drawn.token for drawn, _ in tokens],
            "entropy": [drawn.entropy for drawn, _ in tokens],
            "top": top,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def usage_of(n_prompt: int, n_cached: int, n_written: int) -> dict[str, Any]:
    """What a request took, in tokens."""
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_written,
        "total_tokens": n_prompt + n_written,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _finite(log_prob: float) -> float:
    """JSON has no infinity; the interface's own smallest number stands for it."""
    return max(log_prob, -9999.0)


def _reason(reason: str | None) -> str | None:
    return REASONS.get(reason, reason) if reason is not None else None


def token_ids(written: Sequence[Written]) -> list[int]:
    """The tokens of a text, or of a part of one."""
    return [one.drawn.token for one in written if one.drawn is not None]


def mean_log_prob(written: Sequence[Written]) -> float:
    """The mean log-probability of a text's tokens in nats; −∞ for a text without any."""
    found = [one.drawn.log_prob for one in written if one.drawn is not None]
    return sum(found) / len(found) if found else float("-inf")
