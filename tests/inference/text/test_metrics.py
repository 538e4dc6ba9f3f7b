import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.inference.text.metrics import format_metrics, text_metrics


def slow_distinct(tokens, n):
    """Count the n-grams that did not come before, by looking back at all of them."""
    n_grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    new = [g for i, g in enumerate(n_grams) if g not in n_grams[:i]]
    return len(new) / len(n_grams) if n_grams else None


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-20, 0), st.floats(0, 11)), max_size=25))
def test_metrics_are_their_definitions(drawn):
    tokens, log_probs, entropies = ([d[i] for d in drawn] for i in range(3))
    metrics = text_metrics(tokens, log_probs, entropies, 0.25)
    assert metrics["n_tokens"] == len(tokens)
    for n in (1, 2, 3):
        assert metrics[f"distinct_{n}"] == slow_distinct(tokens, n)
    distinct_4 = slow_distinct(tokens, 4)
    assert metrics["rep_4"] == (None if distinct_4 is None else pytest.approx(1 - distinct_4))
    for name, values in (("mean_log_prob", log_probs), ("entropy", entropies)):
        mean = pytest.approx(sum(values) / len(values)) if values else None
        assert metrics[name] == mean
    assert metrics["drift"] == 0.25
    assert json.loads(json.dumps(metrics)) == metrics


def test_a_loop_is_all_repetition():
    metrics = text_metrics([1, 2] * 50, [-1.0] * 100, [0.0] * 100)
    assert metrics["distinct_1"] == 2 / 100
    assert metrics["distinct_3"] == 2 / 98
    assert metrics["rep_4"] == 1 - 2 / 97
    assert metrics["drift"] is None


def test_the_line_has_what_is_defined():
    line = format_metrics(text_metrics([5, 5, 6], [-1, -2, -3], [1, 1, 2.5], 0.125))
    assert line == (
        "3 tokens, mean log-probability -2.000, entropy 1.500, distinct-1 0.667,"
        " distinct-2 1.000, distinct-3 1.000, drift 0.125"
    )
    assert format_metrics(text_metrics([], [], [])) == "0 tokens"
