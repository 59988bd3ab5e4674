"""Simulated raters: a known taste, a known error rate, and the best accuracy that those leave.

The noise: with some probability a rater misreads an answer, and then takes it for the best or for
the
worst of all, each half of the time. A pair of which at least one answer was misread is ordered by
the
toss of a coin, so a pair comes out the wrong way round with half the probability that one of its
two
was misread: `error_rate`, whatever the pair and however many answers are ranked.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from random import Random

# Scores no further apart than this look the same, and tie; a larger gap is a clear one. A right
# answer and one with a fault are clearly apart; one fault or two, hardly.
TIE_WIDTH = 0.3

Groups = list[list[int]]


def rank(scores: Sequence[float], rng: Random, error_rate: float) -> Groups:
    """Indices of `scores` in groups, best first; a tie is a group of several."""
    if not 0 <= error_rate < 0.5:
        raise ValueError(f"error_rate: expected at least 0 and below 0.5, got {error_rate}")
    misread = 1 - (1 - 2 * error_rate) ** 0.5
    perceived = [
        rng.choice((-1, 1)) * rng.uniform(10, 1000) if rng.random() < misread else score
        for score in scores
    ]
    groups: Groups = []
    for i in sorted(range(len(scores)), key=lambda i: -perceived[i]):
        if groups and perceived[groups[-1][0]] - perceived[i] <= TIE_WIDTH:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def agreement(scores: Sequence[float], groups: Groups) -> tuple[float, int]:
    """How many strictly ranked pairs `scores` orders as `groups` do, and how many pairs there are.

    Equal scores say nothing of a pair, which counts as one half.
    """
    place = {i: n for n, group in enumerate(groups) for i in group}
    strict = [(a, b) if place[a] < place[b] else (b, a) for a, b in combinations(place, 2)]
    strict = [(better, worse) for better, worse in strict if place[better] != place[worse]]
    agreed = sum(
        1.0 if scores[better] > scores[worse] else 0.5 * (scores[better] == scores[worse])
        for better, worse in strict
    )
    return agreed, len(strict)


def ceiling(judged: Iterable[tuple[Sequence[float], Groups]]) -> float:
    """The pairwise accuracy of the true taste itself against rankings: nobody can do better for
    long.

    `judged` holds the gold scores and the ranking of each prompt.
    """
    counts = [agreement(scores, groups) for scores, groups in judged]
    pairs = sum(n for _, n in counts)
    if not pairs:
        raise ValueError("judged: expected at least one strictly ranked pair, got none")
    return sum(agreed for agreed, _ in counts) / pairs


def expected_ceiling(score_sets: Iterable[Sequence[float]], error_rate: float) -> float:
    """What `ceiling` comes to on average over rankings of answers with these scores.

    A clear pair is always ranked, right with probability 1 - error_rate. Any other is ranked
    strictly
    only where one of its two was misread, with probability 2 * error_rate, and right half of the
    time.
    """
    gaps = [abs(a - b) for scores in score_sets for a, b in combinations(scores, 2)]
    if not gaps:
        raise ValueError("score_sets: expected at least one pair of scores, got none")
    clear = sum(gap > TIE_WIDTH for gap in gaps)
    unclear = (len(gaps) - clear) * 2 * error_rate
    return (clear * (1 - error_rate) + unclear / 2) / (clear + unclear)
