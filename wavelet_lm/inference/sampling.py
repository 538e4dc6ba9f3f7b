"""From logits to the next token.

Functions on logits [B, V], one text per row. The order is: repetition penalty, temperature, top-k,
top-p, draw.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wavelet_lm.errors import UserError

# Beyond this factor every logit but the largest is out of float32's reach anyway.
MAX_SHARPENING = 1e30


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; the defaults draw from the model's distribution as it is.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 = all.
        top_p: draw among the fewest tokens that together hold this probability.
        repetition_penalty: divides the positive logits of tokens seen before and multiplies their
            negative ones (Keskar et al. 2019, as `transformers` does it); 1 = none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed, words in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        ):
            if not allowed:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {words}")


def draw(
    logits: Tensor, seen: Tensor, options: SamplingOptions, generator: torch.Generator
) -> Tensor:
    """The next token of every row, [B] int64; arguments as for `probabilities`.

    `generator` must be on the device of the logits.
    """
    if options.temperature == 0:
        return penalize(logits, seen, options.repetition_penalty).argmax(-1)
    return torch.multinomial(probabilities(logits, seen, options), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, seen: Tensor, options: SamplingOptions) -> Tensor:
    """The distribution that tokens are drawn from, [B, V] in float32 at least.

    Args:
        logits: [B, V], finite.
        seen: [B, V] bool, the tokens that are in the prompt or were generated.
        options: with a temperature above 0.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = penalize(wide, seen, options.repetition_penalty)
    wide = apply_temperature(wide, options.temperature)
    return keep_top_p(keep_top_k(wide, options.top_k), options.top_p).softmax(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` less likely (more likely for a penalty below 1)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """(logits − their largest) / temperature; the shift keeps small temperatures finite."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted * min(1 / temperature, MAX_SHARPENING)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ for all but the k largest of each row; exactly k stay where logits tie."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    values, tokens = logits.topk(k)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """−∞ for all but the fewest likeliest tokens whose probabilities sum to at least p."""
    if p == 1:
        return logits
    ordered, tokens = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    held_by_likelier = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill(held_by_likelier >= p, -math.inf)
    return torch.empty_like(logits).scatter(-1, tokens, ordered)
