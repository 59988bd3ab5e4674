"""Every threshold refuses, and says why."""

import math

import pytest

from training.config import GateConfig
from training.evaluation.interval import Interval
from training.gate import decide

CONFIG = GateConfig(max_kl=20.0, min_win_rate=0.5, judge="gold", max_lm_loss_rise=0.1)
WINS = Interval(0.6, 0.55, 0.65)


def test_a_good_policy_passes() -> None:
    assert decide(CONFIG, WINS, people=5, kl=20.0, lm_loss_rise=0.1).passed


@pytest.mark.parametrize(
    ("win_rate", "kl", "rise", "reason"),
    [
        (WINS, 20.1, 0.0, "KL to the parent: expected at most 20 nats a response, got 20.10"),
        (
            Interval(0.6, 0.5, 0.7),
            1.0,
            0.0,
            "win rate by gold: expected the 95 % interval above 0.5, got 0.600 [0.500, 0.700]",
        ),
        (
            WINS,
            1.0,
            0.11,
            "held-out language modelling: expected a rise of at most 0.1 nats a token, got 0.110",
        ),
    ],
)
def test_each_threshold_refuses(win_rate: Interval, kl: float, rise: float, reason: str) -> None:
    decision = decide(CONFIG, win_rate, 5, kl, rise)
    assert not decision.passed
    assert decision.reasons == (reason,)


def test_what_is_not_a_number_fails() -> None:
    nan = math.nan
    assert len(decide(CONFIG, Interval(nan, nan, nan), 5, nan, nan).reasons) == 3


def test_too_few_people_are_no_evidence() -> None:
    decision = decide(CONFIG, WINS, people=4, kl=1.0, lm_loss_rise=0.0)
    assert decision.reasons == ("held-out people: expected prompts of at least 5, got 4",)
