"""What a generated text is like, in numbers: how likely, how uncertain, how repetitive."""

from collections.abc import Sequence


def text_metrics(
    tokens: Sequence[int],
    log_probs: Sequence[float],
    entropies: Sequence[float],
    drift: float | None = None,
) -> dict[str, float | int | None]:
    """The metrics of one text, None where they are not defined (a mean over nothing).

    Args:
        tokens: the generated ones.
        log_probs, entropies: at each of them, of the model's own distribution, in nats.
        drift: of the text from its prompt (`coherence.py`), where it was measured.

    Returns:
        n_tokens; mean_log_prob and entropy, means per token in nats; distinct_1, distinct_2 and
        distinct_3, the share of different n-grams among all (Li et al., 2016, "A
        Diversity-Promoting Objective Function for Neural Conversation Models"); rep_4, the share
        of 4-grams that came before (Welleck et al., 2020, "Neural Text Generation with
        Unlikelihood Training"); drift.
    """
    distinct = {n: _distinct_share(tokens, n) for n in (1, 2, 3, 4)}
    return {
        "n_tokens": len(tokens),
        "mean_log_prob": _mean(log_probs),
        "entropy": _mean(entropies),
        "distinct_1": distinct[1],
        "distinct_2": distinct[2],
        "distinct_3": distinct[3],
        "rep_4": None if distinct[4] is None else 1 - distinct[4],
        "drift": drift,
    }


def format_metrics(metrics: dict[str, float | int | None]) -> str:
    """The metrics as one line; those that are not defined are left out.

    `64 tokens, mean log-probability -2.345, entropy 3.012, distinct-1 0.812, …`
    """
    words = {"mean_log_prob": "mean log-probability"}
    parts = [f"{metrics['n_tokens']} tokens"]
    parts += [
        f"{words.get(name, name.replace('_', '-'))} {value:.3f}"
        for name, value in metrics.items()
        if name != "n_tokens" and value is not None
    ]
    return ", ".join(parts)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _distinct_share(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams ÷ n-grams."""
    n_grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(n_grams)) / len(n_grams) if n_grams else None
