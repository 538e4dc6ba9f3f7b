import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from wavelet_lm.inference.sampling.random import splitmix64, uniforms

MASK = (1 << 64) - 1


def slow_splitmix64(seed, n):
    """The first n numbers, as the generator is defined: by its state, in Python's integers."""
    numbers = []
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(z ^ (z >> 31))
    return numbers


def unsigned(numbers):
    return [number & MASK for number in numbers.tolist()]


def test_the_numbers_are_the_published_ones():
    assert unsigned(splitmix64(torch.tensor(1234567), torch.arange(5))) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(0, 2**63 - 1))
def test_counting_gives_what_walking_gives(seed):
    walked = slow_splitmix64(seed, 40)
    seeds, counters = torch.full((40,), seed), torch.arange(40)
    assert unsigned(splitmix64(seeds, counters)) == walked
    assert uniforms(seeds, counters).tolist() == [(z >> 11) / 2**53 for z in walked]


def test_a_row_has_the_numbers_it_has_alone():
    seeds, counters = torch.tensor([[3], [2**63 - 1], [0]]), torch.arange(7)
    together = uniforms(seeds, counters)
    assert together.shape == (3, 7)
    for row, seed in zip(together, seeds, strict=True):
        for number, counter in zip(row, counters, strict=True):
            assert torch.equal(number, uniforms(seed, counter)[0])


@pytest.mark.parametrize("along", ["counters", "seeds"])
def test_the_numbers_are_uniform_along_counters_and_along_seeds(along):
    n, line, constant = 100_000, torch.arange(100_000), torch.tensor(5)
    numbers = uniforms(*((constant, line) if along == "counters" else (line, constant)))
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    cells = (numbers[1:] * 10).long() * 10 + (numbers[:-1] * 10).long()
    assert chisquare(torch.bincount(cells, minlength=100)).pvalue > 1e-3
    assert len(numbers.unique()) == n
