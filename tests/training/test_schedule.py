"""The learning rate against a table of its straight line and cosine, and the steps of an epoch."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.config import Config
from wavelet_lm.data.batches import steps_per_epoch
from wavelet_lm.training.schedule import learning_rate, warmup_steps


def slow_rates(config, total):
    """All rates of a run, one after the other."""
    n_warmup = int(Decimal(str(config.warmup_fraction)) * total)
    rates = [config.lr * k / n_warmup for k in range(1, n_warmup + 1)]
    n_decay = total - n_warmup
    for k in range(n_decay):
        angle = math.pi * (k / (n_decay - 1) if n_decay > 1 else bool(n_warmup))
        mean, swing = (config.lr + config.min_lr) / 2, (config.lr - config.min_lr) / 2
        rates.append(mean + swing * math.cos(angle))
    return rates


@given(total=st.integers(1, 200), fraction=st.floats(0, 1), min_lr=st.floats(0, 0.01))
def test_every_rate_is_that_of_the_slow_version(total, fraction, min_lr):
    config = Config(warmup_fraction=fraction, lr=0.01, min_lr=min_lr)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert rates == pytest.approx(slow_rates(config, total), rel=1e-12, abs=1e-15)
    assert all(0 < rate <= 0.01 * (1 + 1e-12) for rate in rates if min_lr > 0)


@pytest.mark.parametrize(("total", "fraction"), [(100, 0.3), (7, 0.5), (1000, 0.001), (10, 0)])
def test_the_ends_of_warmup_and_cosine(total, fraction):
    config = Config(warmup_fraction=fraction, lr=0.02, min_lr=3e-4)
    n = warmup_steps(config, total)
    assert n == int(fraction * total)
    if n:
        assert learning_rate(config, 0, total) == pytest.approx(0.02 / n)
        assert learning_rate(config, n - 1, total) == 0.02
    assert learning_rate(config, n, total) == 0.02
    assert learning_rate(config, total - 1, total) == pytest.approx(3e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("total", "fraction", "n"), [(100, 0.29, 29), (1000, 0.001, 1), (10, 0.7, 7), (3, 1 / 3, 0)]
)
def test_the_warmup_is_that_of_the_fraction_as_written(total, fraction, n):
    """0.29 * 100 is 28.999… in binary; a third is written as a bit less than one."""
    assert warmup_steps(Config(warmup_fraction=fraction), total) == n


@pytest.mark.parametrize(("total", "fraction"), [(10, 0.9), (10, 0.8), (2, 0.5), (10, 0)])
def test_the_last_rate_is_min_lr(total, fraction):
    config = Config(warmup_fraction=fraction, lr=0.02, min_lr=3e-4)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert rates[-1] == pytest.approx(3e-4, rel=1e-12)
    assert max(rates) == 0.02


def test_all_warmup_and_a_single_step():
    config = Config(warmup_fraction=1, lr=0.02, min_lr=0)
    assert [learning_rate(config, s, 4) for s in range(4)] == [0.005, 0.01, 0.015, 0.02]
    assert learning_rate(Config(warmup_fraction=0, lr=0.02), 0, 1) == 0.02


def test_steps_of_an_epoch_round_down_but_are_at_least_one():
    config = Config(micro_batch_size=4, grad_accum=3, block_size=10)
    counted = [steps_per_epoch(config, n) for n in (1, 119, 120, 239, 240, 1207)]
    assert counted == [1, 1, 1, 1, 2, 10]
