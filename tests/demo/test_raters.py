"""Simulated raters: ties, the error rate, and the ceiling that it sets."""

from itertools import combinations
from random import Random

import pytest

from demo.raters import agreement, ceiling, expected_ceiling, rank

SCORES = (2.0, 1.6, 1.2, 0.8, 0.4)


def test_a_careful_rater_orders_by_score_and_ties_what_is_equal() -> None:
    assert rank([0.5, 1.0, 0.5, 0.0, 1.0], Random(0), 0.0) == [[1, 4], [0, 2], [3]]


def test_nearly_equal_scores_tie_and_clear_gaps_never_do() -> None:
    assert rank([0.30, 0.52, 0.9], Random(0), 0.0) == [[2], [1, 0]]
    # Each is close to its neighbour, but the first and the last are clearly apart.
    assert rank([0.90, 0.65, 0.55, 0.40], Random(0), 0.0) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("error_rate", [0.05, 0.1, 0.2])
def test_a_clear_pair_is_the_wrong_way_round_at_the_error_rate(error_rate: float) -> None:
    rng, rounds = Random(1), 4000
    wrong = dict.fromkeys(combinations(range(5), 2), 0)
    for _ in range(rounds):
        groups = rank(SCORES, rng, error_rate)
        place = {i: n for n, group in enumerate(groups) for i in group}
        for better, worse in wrong:
            wrong[better, worse] += place[better] > place[worse]
    for count in wrong.values():
        assert count / rounds == pytest.approx(error_rate, abs=0.025)
    assert sum(wrong.values()) / rounds / 10 == pytest.approx(error_rate, abs=0.01)


@pytest.mark.parametrize("error_rate", [-0.1, 0.5, 1.0])
def test_an_impossible_error_rate_is_refused(error_rate: float) -> None:
    with pytest.raises(ValueError, match="error_rate"):
        rank(SCORES, Random(0), error_rate)


def test_agreement_counts_strict_pairs_and_halves_for_equal_scores() -> None:
    # Pairs: 0 over 1 right, 0 over 2 right, 1 over 2 wrong; of the second, 0 and 1 tie.
    assert agreement([0.9, 0.1, 0.5], [[0], [1], [2]]) == (2.0, 3)
    assert agreement([0.9, 0.1, 0.5], [[0, 1], [2]]) == (1.0, 2)
    assert agreement([0.5, 0.5], [[1], [0]]) == (0.5, 1)


def test_the_ceiling_is_what_the_true_taste_reaches() -> None:
    rng = Random(2)
    score_sets = [[rng.choice((1.0, 1.0, 0.6, 0.5, 0.3)) for _ in range(5)] for _ in range(6000)]
    judged = [(scores, rank(scores, rng, 0.1)) for scores in score_sets]
    assert ceiling(judged) == pytest.approx(expected_ceiling(score_sets, 0.1), abs=0.01)
    assert expected_ceiling([SCORES], 0.1) == pytest.approx(0.9)
    # One clear pair of two, and two equal ones seen strictly at 0.2: (2 * 0.9 + 0.1) / 2.2.
    assert expected_ceiling([[1.0, 0.5, 0.5]], 0.1) == pytest.approx(1.9 / 2.2)


def test_no_pair_no_ceiling() -> None:
    with pytest.raises(ValueError, match="strictly ranked pair"):
        ceiling([([0.5, 0.5], [[0, 1]])])
