"""What the ablations train on: nobody learns from those who are held out."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.worlds import K, World, generated, human
from demo.tasks import from_prompt, good_answer
from training.data import PromptRow, RankedRow, SftRow, prompt_text

DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", "no data folder"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="INSTRUCTLOOP_DATA names no data folder")
WORLDS = [
    pytest.param(generated, id="generated"),
    pytest.param(human, id="e2e", marks=needs_data),
]
rng = random.Random(0)


def answered(row: PromptRow) -> list[tuple[str, bool]]:
    """Answers that say nothing, and then a right one."""
    task = from_prompt(prompt_text(row))
    assert task is not None
    return [("", True)] * (K - 1) + [(good_answer(task, rng), True)]


def ranked(world: World) -> tuple[list[RankedRow], list[RankedRow]]:
    return world.rankings([answered(row) for row in world.asked])


@pytest.mark.parametrize("make", WORLDS)
def test_no_rater_is_on_both_sides(make: Callable[[int], World]) -> None:
    learned, held_out = ranked(make(1))
    raters = {r.rater_id for r in held_out}
    assert learned and raters
    assert raters.isdisjoint(r.rater_id for r in learned)
    assert {r.rater_id for r in ranked(make(2))[1]} != raters


@pytest.mark.parametrize("make", WORLDS)
def test_policies_are_compared_on_prompts_that_no_reward_model_and_no_policy_learned_from(
    make: Callable[[int], World],
) -> None:
    world = make(1)
    tested = {prompt_text(row) for row in world.test}
    seen = [*world.prompts, *ranked(world)[0]]
    assert len(tested) == len(world.test)
    assert tested.isdisjoint(prompt_text(row) for row in seen)
    assert set(world.held_out).isdisjoint(world.documents)


@pytest.mark.parametrize("make", WORLDS)
def test_the_gold_judge_prefers_what_people_wrote_to_nothing(make: Callable[[int], World]) -> None:
    world = make(1)
    rows: list[SftRow] = world.demonstrations[:50]
    said = world.gold(rows, [row.response for row in rows], [True] * 50)
    assert sum(said) / 50 > sum(world.gold(rows, [""] * 50, [True] * 50)) / 50 + 0.3


def test_raters_err_as_those_of_the_demo() -> None:
    learned, held_out = ranked(generated(1))
    rows = [*learned, *held_out]
    # An answer is misread with probability 1 - sqrt(1 - 2 * 0.15) = 0.163, half of the time for the
    # best. The right one is alone at the top where none of the five is (0.837 * 0.918^4 = 0.595),
    # or where it is itself, and higher than others (0.082 * 0.85 = 0.069).
    best = [row.ranks[-1] == 0 and row.ranks.count(0) == 1 for row in rows]
    assert sum(best) / len(rows) == pytest.approx(0.66, abs=0.07)
