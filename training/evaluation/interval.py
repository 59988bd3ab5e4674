"""Means with 95 % intervals, resampled by person."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        return [self.low, self.high]


def clustered_mean(
    values: Sequence[float], clusters: Sequence[str], seed: int = 0, draws: int = 2000
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval, drawing whole clusters with
    replacement.

    What one person asked or ranked hangs together, so people are drawn, not rows (Efron &
    Tibshirani, 1993, ch. 8).
    """
    if not values:
        raise ValueError("clustered_mean: expected at least one value, got none")
    sums: dict[str, tuple[float, int]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        total, count = sums.get(cluster, (0.0, 0))
        sums[cluster] = total + value, count + 1
    people = list(sums.values())
    rng = random.Random(seed)
    means = sorted(_ratio(rng.choices(people, k=len(people))) for _ in range(draws))
    return Interval(_ratio(people), means[int(0.025 * draws)], means[int(0.975 * draws)])


def _ratio(people: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in people) / sum(count for _, count in people)
