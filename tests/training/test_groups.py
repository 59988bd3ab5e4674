"""Groups of raters with a head each: what each likes, an equal say in the reward, refusals."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from contracts.errors import InvalidInput
from tests.training.letters import (
    GROUPS,
    REWARD,
    World,
    demonstrations,
    rankings,
    two_tastes,
)
from training.config import RewardModelConfig
from training.data import RankedRow
from training.evaluation.reward_models import held_out_figures
from training.metrics import Metrics
from training.model import load_tokenizer
from training.networks import load_networks
from training.reward_head import REWARD_HEAD, RewardModel
from training.reward_model import (
    by_group,
    demonstration_sequences,
    encode_rankings,
    score_sequences,
    train_reward_model,
)

TOGETHER = REWARD.model_copy(update={"epochs": 3})
APART = TOGETHER.model_copy(update={"groups": GROUPS})


def trained(config: RewardModelConfig, world: World, folder: Path) -> Path:
    learned, zero = two_tastes(400, seed=3), demonstrations(32, seed=4)
    with closing(Metrics(folder)) as metrics:
        train_reward_model(config, world.sft, learned, zero, folder / "model", metrics)
    return folder / "model"


@pytest.fixture(scope="module")
def together(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(TOGETHER, world, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def apart(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(APART, world, tmp_path_factory.mktemp("apart"))


def test_heads_learn_what_each_group_likes_and_the_reward_lets_both_have_a_say(
    together: Path, apart: Path
) -> None:
    held_out = two_tastes(300, seed=99)
    found = held_out_figures(APART, [apart], held_out)["groups"]
    one = {
        name: held_out_figures(
            TOGETHER, [together], [r for r in held_out if APART.group_of(r.rater_id) == name]
        )["accuracy"]
        for name in GROUPS
    }
    # One head goes with the four fifths; the others' pairs it orders hardly better than a coin.
    assert one["likes"] > one["dislikes"] + 0.2
    assert min(group["own_accuracy"] for group in found.values()) > 0.85
    assert min(group["accuracy"] for group in found.values()) > one["dislikes"] + 0.05
    assert sum(group["pairs"] for group in found.values()) > 500


def test_a_group_costs_nothing_where_all_like_the_same(world: World, tmp_path: Path) -> None:
    def same(count: int, seed: int) -> list[RankedRow]:
        pairs = zip(two_tastes(count, seed), rankings(count, seed), strict=True)
        return [replace(row, ranks=liked.ranks) for row, liked in pairs]

    with closing(Metrics(tmp_path)) as metrics:
        rows, zero = same(400, seed=3), demonstrations(32, seed=4)
        train_reward_model(APART, world.sft, rows, zero, tmp_path / "model", metrics)
    found = held_out_figures(APART, [tmp_path / "model"], same(300, seed=99))
    assert found["accuracy"] > 0.95
    assert min(group["own_accuracy"] for group in found["groups"].values()) > 0.95


def test_demonstrations_score_zero_for_each_group_and_all_spread_alike_in_the_reward(
    apart: Path,
) -> None:
    rows = demonstration_sequences(APART, load_tokenizer(apart), demonstrations(32, seed=4))
    own = {
        name: score_sequences(RewardModel.load(apart, group=name).eval(), rows) for name in GROUPS
    }
    reward = score_sequences(RewardModel.load(apart).eval(), rows)
    for scores in (*own.values(), reward):
        assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    spreads = {name: scores.std(correction=0) for name, scores in own.items()}
    spread = sum(spreads.values()) / 2
    alike = [own[name] * spread / spreads[name] for name in GROUPS]
    torch.testing.assert_close(reward, (alike[0] + alike[1]) / 2, atol=1e-4, rtol=1e-4)
    assert abs(spreads["likes"] - spreads["dislikes"]) > 0.01 * spread  # so that it could differ


def test_ppo_gets_one_head_for_all(world: World, apart: Path) -> None:
    head, nets = load_file(apart / REWARD_HEAD), load_networks(world.sft, apart)
    assert nets.value is not None
    for model in (nets.reward, nets.value):
        assert torch.equal(model.head.weight, head["weight"])
        assert model.head.weight.shape == (1, 64)
        assert model.shift.shape == ()


def test_without_groups_a_head_has_what_it_always_had(together: Path) -> None:
    found = {name: tuple(x.shape) for name, x in load_file(together / REWARD_HEAD).items()}
    assert found == {"weight": (1, 64), "bias": (1,), "shift": ()}
    assert by_group(TOGETHER, []) == []


def test_a_group_that_was_not_trained_is_refused_by_name(together: Path, apart: Path) -> None:
    with pytest.raises(InvalidInput, match=r"group: expected one of \['dislikes', 'likes'\], got"):
        RewardModel.load(apart, group="hates")
    with pytest.raises(InvalidInput, match=r"group: expected one of \[\], got 'likes'"):
        RewardModel.load(together, group="likes")


def test_a_rater_is_in_the_first_group_that_fits() -> None:
    config = RewardModelConfig(groups={"few": ("user-1", "x?"), "most": ("user-*", "y")})
    found = {r: config.group_of(r) for r in ("user-1", "user-12", "x1", "x12", "y", "Y")}
    assert found == {
        "user-1": "few",
        "user-12": "most",
        "x1": "few",
        "x12": None,
        "y": "most",
        "Y": None,
    }
    with pytest.raises(ValidationError, match=r"groups: expected two or more, or none, got"):
        RewardModelConfig(groups={"all": ("*",)})


def test_who_is_in_no_group_and_groups_of_too_few_are_refused(world: World) -> None:
    ranked = encode_rankings(APART, load_tokenizer(world.sft), two_tastes(400, seed=3))
    assert {r.group for r in by_group(APART, ranked)} == set(GROUPS)
    stranger = replace(ranked[0], rater_id="stranger")
    with pytest.raises(InvalidInput, match=r"groups: expected a group for every rater, got 'str"):
        by_group(APART, [*ranked, stranger])
    theirs = [r for r in ranked if r.rater_id.startswith("dislikes-")]
    others = [r for r in ranked if r not in theirs]
    with pytest.raises(InvalidInput, match=r"groups\.dislikes: expected .* got '29 of [56]'"):
        by_group(APART, [*others, *theirs[:29]])
    alone = [replace(r, rater_id="dislikes-0") for r in theirs]
    with pytest.raises(InvalidInput, match=rf"groups\.dislikes: .* got '{len(alone)} of 1'"):
        by_group(APART, [*others, *alone])


def test_held_out_raters_of_no_group_count_in_the_whole_alone(apart: Path) -> None:
    rows = two_tastes(60, seed=99)
    strange = [replace(row, rater_id=f"stranger-{i}") for i, row in enumerate(rows)]
    found = held_out_figures(APART, [apart], [*rows, *strange])
    assert found["pairs"] == 2 * sum(group["pairs"] for group in found["groups"].values())
    assert held_out_figures(APART, [apart], strange)["groups"] == {}
