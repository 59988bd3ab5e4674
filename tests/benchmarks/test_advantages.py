"""Runs are compared where they have moved equally far."""

import pytest

from benchmarks.ablations import BATCH, WINDOW
from benchmarks.advantages import KL, at_kl
from contracts.errors import InvalidInput


def steps(*windows: tuple[float, float]) -> list[dict[str, float]]:
    """KL and reward of each window, both around their means; gold is minus the reward."""
    return [
        {"kl": (kl + sign * 0.01) * KL, "reward": reward + sign, "gold": -reward - sign}
        for kl, reward in windows
        for sign in [1, -1] * (WINDOW // 2)
    ]


def test_reward_at_a_kl_is_between_two_windows_by_hand() -> None:
    found = at_kl(steps((0.0, 1.0), (0.6, 2.0), (1.4, 4.0), (3.0, 5.0)))
    # Half of the way from the second window to the third.
    assert found["reward"] == pytest.approx(3.0)
    assert found["gold"] == pytest.approx(-3.0)
    assert found["episodes"] == pytest.approx(BATCH * WINDOW * 2)
    assert (found["kl_end"], found["reward_end"]) == pytest.approx((3.0 * KL, 5.0))


def test_a_run_that_stays_near_is_refused() -> None:
    with pytest.raises(InvalidInput, match="KL: expected a run that gets to"):
        at_kl(steps((0.0, 1.0), (0.9, 2.0)))
