"""Random numbers by counter: the n-th number of a seed, on any device and in any batch.

SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators") walks a
64-bit counter in steps of the golden ratio and mixes it, so its n-th output needs no state. That is
what makes a row of a batch draw the same numbers as the same text alone.
"""

from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def splitmix64(seeds: Tensor, counters: Tensor) -> Tensor:
    """The output number `counters` (0 is the first) of the generator seeded with `seeds`.

    Both are int64 of shapes that broadcast, and so is the result.
    """
    z = seeds + (counters + 1) * GOLDEN_GAMMA
    z = (z ^ _shift(z, 30)) * MIX_1
    z = (z ^ _shift(z, 27)) * MIX_2
    return z ^ _shift(z, 31)


def uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 of 53 bits; arguments int64 of shapes that broadcast."""
    return _shift(splitmix64(seeds, counters), 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
