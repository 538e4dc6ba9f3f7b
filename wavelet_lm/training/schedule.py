"""Learning rate: linear warm-up, then a cosine down to `min_lr`."""

import math

from wavelet_lm.config import TrainingConfig


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    return int(config.warmup_fraction * total_steps)


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of the update number `step` (from 0); the last one of the warm-up reaches `lr`."""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
