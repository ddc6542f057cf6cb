"""Statistics over users: a user is the unit, so every interval is taken over users."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over users and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, seed: int = 0, level: float = 0.95, draws: int = 10_000) -> Interval:
    """Mean over users with a percentile bootstrap interval (Efron 1979): users are redrawn with replacement.

    For a paired comparison of two methods give the users' differences.

    Args:
        values: [users], one number per user.
        level:  share of redrawn means that the interval holds.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"bootstrap_mean: needs one number per user, got shape {values.shape}.")
    rng = np.random.default_rng(seed)
    means = np.concatenate([
        values[rng.integers(len(values), size=(100, len(values)))].mean(1) for _ in range(-(-draws // 100))
    ])  # [draws]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
