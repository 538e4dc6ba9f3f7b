"""From logits to the next token.

Functions on logits [B, V], one text per row; no row looks at another. They compute in float32 at
least. The order is: repetition penalty, temperature, top-k, top-p, draw. Nothing here waits for the
device, and all of it can be traced by `torch.compile` as one graph.

Every option has a range in which no step leaves float32: from finite logits comes a distribution
that is finite and sums to 1, whatever the options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wavelet_lm.config import GenerationConfig
from wavelet_lm.config.option import option, option_of
from wavelet_lm.config.run import LARGEST
from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import check_fields


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn; the defaults draw from the model's distribution as it is.

    What a run's config has as well is declared there, and all of them are checked by their ranges.
    The repetition penalty is that of Keskar et al. 2019, as `transformers` has it.
    """

    temperature: float = option_of(GenerationConfig, "temperature", 1.0)
    top_k: int = option_of(GenerationConfig, "top_k", 0)
    top_p: float = option_of(GenerationConfig, "top_p", 1.0)
    repetition_penalty: float = option_of(GenerationConfig, "repetition_penalty", 1.0)
    entropy_adaptive: bool = option(
        False,
        "a temperature for every token, in place of --temperature: max − (H / ln V)(max − min), H"
        " the entropy",
    )
    entropy_temp_min: float = option(0.3, "its min", above=0, maximum=LARGEST)
    entropy_temp_max: float = option(1.5, "its max", above=0, maximum=LARGEST)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.entropy_temp_max < self.entropy_temp_min:
            raise UserError(
                f"entropy_temp_max is {self.entropy_temp_max}; it must be between entropy_temp_min"
                f" ({self.entropy_temp_min}) and {LARGEST:g}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that no random number is needed."""
        return self.temperature == 0 and not self.entropy_adaptive


def draw(
    logits: Tensor,
    seen: Tensor,
    options: SamplingOptions,
    uniforms: Tensor,
    top_p: Tensor | None = None,
) -> Tensor:
    """The next token of every row, [B] int64.

    Args:
        uniforms: [B] float64 in [0, 1), what decides each draw; greedy options ignore it.
        logits, seen, options, top_p: as for `adjusted`. For logits that are not finite the token
            means nothing, but it is one of the vocabulary.
    """
    if options.greedy:
        return penalize(widened(logits), seen, options.repetition_penalty).argmax(-1)
    return draw_from(probabilities(logits, seen, options, top_p), uniforms)


def draw_from(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from distributions [B, V] by inverting their cumulative sums: [B] int64.

    A row takes its first token whose cumulative sum, in float64, exceeds its number of `uniforms`
    [B] times the total; so rows need not sum to 1, and a token of probability 0 is never drawn.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # A parallel sum may step by its rounding even where it adds nothing.
    cumulative = cumulative.masked_fill(probabilities == 0, 0)
    threshold = uniforms[:, None] * cumulative.amax(-1, keepdim=True)
    return (cumulative > threshold).byte().argmax(-1)


def probabilities(
    logits: Tensor, seen: Tensor, options: SamplingOptions, top_p: Tensor | None = None
) -> Tensor:
    """The distribution that tokens are drawn from, [B, V]; `seen` [B, V] bool; see `adjusted`."""
    return adjusted(logits, seen, options, top_p).softmax(-1)


def adjusted(
    logits: Tensor, seen: Tensor, options: SamplingOptions, top_p: Tensor | None = None
) -> Tensor:
    """The logits [B, V] of the distribution that tokens are drawn from; −∞ for excluded ones.

    A temperature of 0 leaves the logits' scale alone: what it is for, the argmax, is the same.

    Args:
        logits: [B, V], finite.
        seen: [B, V] bool, the tokens that are in the prompt or were generated.
        options: how to adjust them.
        top_p: [B], takes the place of `options.top_p` for each row.
    """
    raw = widened(logits)
    scores = penalize(raw, seen, options.repetition_penalty)
    if options.entropy_adaptive:
        scores = apply_temperature(scores, adaptive_temperature(raw, options)[:, None])
    elif not options.greedy:
        scores = apply_temperature(scores, options.temperature)
    return keep_likeliest(scores, options.top_k, options.top_p if top_p is None else top_p)


def widened(logits: Tensor) -> Tensor:
    """Logits of any shape in float32, or in float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` less likely (more likely for a penalty below 1).

    logits [B, V], seen [B, V] bool -> [B, V]; what is finite stays finite.
    """
    if penalty == 1:
        return logits
    limit = torch.finfo(logits.dtype).max
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-limit, limit)
    return torch.where(seen, penalized, logits)


def adaptive_temperature(logits: Tensor, options: SamplingOptions) -> Tensor:
    """The temperature of every row, [B]: max − (H / ln V)(max − min), H the entropy of `logits`.

    A certain model is sampled at `entropy_temp_max`, one that knows nothing at `entropy_temp_min`.
    """
    low, high = options.entropy_temp_min, options.entropy_temp_max
    largest = math.log(max(logits.shape[-1], 2))  # of a single token the entropy is 0 anyway
    return high - (entropy(logits) / largest).clamp(0, 1) * (high - low)


def apply_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits − their largest) / temperature; the shift keeps small temperatures finite.

    `temperature` is one for all rows or broadcasts with [B, V].
    """
    if isinstance(temperature, Tensor):
        factor = (1 / temperature).clamp(max=LARGEST)
    elif temperature == 1:
        return logits
    else:
        factor = min(1 / temperature, LARGEST)
    return (logits - logits.amax(-1, keepdim=True)) * factor


def keep_likeliest(logits: Tensor, k: int = 0, p: float | Tensor = 1.0) -> Tensor:
    """−∞ for the tokens that top-k, then top-p exclude.

    Args:
        logits: [B, V].
        k: this many likeliest tokens stay, exactly, whichever of those that tie; 0 = all.
        p: of what k left, the fewest likeliest tokens stay whose probabilities sum to at least p.
            One for all rows or [B]; 1 = all.
    """
    all_k, all_p = not 0 < k < logits.shape[-1], not isinstance(p, Tensor) and p == 1
    if all_k and all_p:
        return logits
    likeliest, tokens = logits.sort(descending=True, stable=True) if all_k else logits.topk(k)
    if not all_p:
        probabilities = likeliest.softmax(-1)
        held_by_likelier = probabilities.cumsum(-1) - probabilities
        if isinstance(p, Tensor):
            # No sum reaches the ∞; one that is rounded may well reach 1 before the last token.
            p = p.to(logits.dtype).masked_fill(p >= 1, math.inf)[:, None]
        excluded = held_by_likelier >= p
        excluded[..., 0] = False  # whatever a sum is rounded to
        likeliest = likeliest.masked_fill(excluded, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, likeliest)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of every row's distribution, [B] in nats."""
    terms = torch.special.entr(widened(logits).softmax(-1))
    # In float64, since a device may cut the sum of one row into other parts than that of many.
    return terms.sum(-1, dtype=torch.float64).to(terms.dtype)


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each row's token: [B] in nats, `tokens` [B] int64."""
    return widened(logits).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
