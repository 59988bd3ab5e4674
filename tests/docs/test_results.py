"""What docs/results.md says of the ablations is what benchmarks/results holds."""

import pytest

from tests.docs.ablations import COMPARED, SETTINGS, WORLDS, plots, results
from tests.docs.pages import DOCS

FIGURES = {f["figure"]: f for suite in WORLDS.values() for f in results(suite)}
ADVANTAGES = {f["figure"]: f for f in results("advantages")}
each_world = pytest.mark.parametrize("world", WORLDS)


def along(world: str, measure: str, setting: str, of: str = "value") -> list[float]:
    """The figure at each value of the setting, in the order of the values."""
    head = f"{world}.{measure}@{setting}="
    return [f[of] for name, f in FIGURES.items() if name.startswith(head)]


@each_world
def test_a_larger_mix_keeps_more_of_the_text(world: str) -> None:
    losses = along(world, "lm_loss_rise", "ptx")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0


def test_a_run_without_a_mix_forgets_text_only_where_it_is_long_enough() -> None:
    assert along("generated", "lm_loss_rise", "ptx", "min")[0] > 0.05
    assert abs(along("e2e", "lm_loss_rise", "ptx")[0]) < 0.001


@each_world
def test_a_larger_penalty_moves_less_and_never_gets_where_the_mix_gets(world: str) -> None:
    distances = along(world, "kl", "beta")
    assert distances == sorted(distances, reverse=True)
    mixed = max(along(world, "lm_loss_rise", "ptx", "max")[-1:])
    assert min(along(world, "lm_loss_rise", "beta", "min")) > mixed


@each_world
def test_the_largest_penalty_learns_least(world: str) -> None:
    gains = along(world, "reward_gain", "beta")
    assert gains[-1] == min(gains)


@each_world
def test_a_long_run_climbs_by_its_reward_model(world: str) -> None:
    rewards, distances = along(world, "reward", "episodes"), along(world, "kl", "episodes")
    assert rewards[-1] == max(rewards)
    assert distances == sorted(distances)


def test_a_long_run_falls_by_the_raters_true_taste() -> None:
    # The best window of the worst seed is better than the last one of the best seed.
    best = max(along("generated", "gold", "episodes", "min"))
    assert along("generated", "gold", "episodes", "max")[-1] < best


@pytest.mark.parametrize("other", ["rloo", "grpo"])
def test_without_a_value_network_an_episode_takes_less_time(other: str) -> None:
    for measure, times in (("cpu", 1.6), ("learning", 2.0)):
        theirs, gae = (ADVANTAGES[f"{measure}@advantage={side}"] for side in (other, "gae"))
        assert theirs["max"] < gae["min"]
        assert times * theirs["value"] < gae["value"]


@pytest.mark.parametrize("other", ["rloo", "grpo"])
def test_at_equal_kl_gold_is_the_same_within_the_seeds(other: str) -> None:
    theirs, gae = (ADVANTAGES[f"gold@advantage={side}"] for side in (other, "gae"))
    assert theirs["min"] < gae["value"] < theirs["max"]


def test_every_panel_of_advantages_has_its_figures() -> None:
    sides = ("gae", "rloo", "grpo")
    assert {f"{m}@advantage={side}" for m in COMPARED for side in sides} <= ADVANTAGES.keys()
    assert (DOCS / "advantages.svg").read_text("utf-8").startswith("<svg ")


def test_no_difference_from_trl_can_be_told() -> None:
    found = {f["figure"]: f for f in results("reward_accuracy")}
    over = found["accuracy_over_trl_ci95"]
    assert over["min"] < 0 < over["max"]
    sides = [found[f"accuracy_{side}"] for side in ("ours", "trl")]
    assert max(s["min"] for s in sides) < min(s["max"] for s in sides)


@pytest.mark.parametrize("group", ["larger", "smaller"])
def test_heads_of_groups_buy_something_where_tastes_conflict_and_cost_nothing_where_not(
    group: str,
) -> None:
    found = {f["figure"]: f for f in results("groups")}
    conflict, agree = (
        {head: found[f"{world}.accuracy@{group},{head}"] for head in ("one", "own", "mean")}
        for world in ("conflict", "agree")
    )
    for end in ("min", "value", "max"):
        assert conflict["own"][end] > conflict["one"][end]
        assert (conflict["mean"][end] > conflict["one"][end]) == (group == "smaller")
        assert agree["own"][end] > agree["one"][end] - 0.005
        assert agree["mean"][end] > agree["one"][end] - 0.01


@each_world
def test_every_panel_has_its_figures(world: str) -> None:
    assert all(along(world, m, setting) for setting, (_, ms) in SETTINGS.items() for m in ms)
    assert {path.name for path in plots(DOCS)} >= {f"ablations-{world}.svg"}
    assert (DOCS / f"ablations-{world}.svg").read_text("utf-8").startswith("<svg ")
