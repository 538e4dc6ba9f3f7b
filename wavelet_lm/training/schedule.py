"""Learning rate: linear warm-up, then a cosine down to `min_lr`."""

import math
from fractions import Fraction

from wavelet_lm.config import TrainingConfig


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps of the warm-up, rounded down: of the fraction as it is written, 0.29 of 100 is 29."""
    return int(Fraction(str(config.warmup_fraction)) * total_steps)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of the update number `step` (from 0).

    The last one of the warm-up reaches `lr` and the first after it has it once more, the last one
    of all has `min_lr`: so has a single one after a warm-up, while a single one of all has `lr`.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    last = total_steps - 1
    if step == warmup == last:
        return config.min_lr if warmup else config.lr
    progress = (step - warmup) / max(1, last - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
