"""Several reward models, folds over labelers, a reward model from elsewhere, and what is chosen by
rewards.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.errors import InvalidInput
from tests import tiny_models
from tests.training.letters import (
    REWARD,
    SFT,
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from tests.training.test_ppo import configured
from training.checkpoint import CHECKPOINTS
from training.config import EvaluationConfig, PpoConfig
from training.data import PromptRow, render
from training.evaluation.comparison import Verdict, mean_rewards, reward_judge
from training.evaluation.interval import Interval
from training.evaluation.reward_models import (
    answers_disagreement,
    cross_validate,
    disagreement,
    held_out_figures,
    labeler_groups,
)
from training.metrics import Metrics, read_metrics
from training.model import load_policy, load_tokenizer
from training.networks import load_networks
from training.ppo import train_ppo
from training.reward_head import RewardModel
from training.reward_model import train_reward_model
from training.rollout import Sampled
from training.sft import train_sft
from training.translation import alike

FEW = REWARD.model_copy(update={"epochs": 8, "folds": 3})


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of another family of tokens, with random weights."""
    root = tmp_path_factory.mktemp("foreign")
    policy = tiny_models.save(root / "policy", 0, tied=True)
    torch.manual_seed(5)
    RewardModel.from_policy(policy).save(root / "reward", load_tokenizer(policy))
    return root / "reward"


def test_disagreement_by_hand() -> None:
    # The unbiased standard deviations of (0, 2) and (1, 1) are 1.4142136 and 0.
    assert disagreement([[0.0, 1.0], [2.0, 1.0]]) == pytest.approx(1.4142136 / 2)
    nobody = Interval(0.5, 0.0, 1.0)
    verdicts = [Verdict(nobody, [[0.0]], [[1.0, 3.0]]), Verdict(nobody, [[0.0]], [[1.0, 5.0]])]
    assert answers_disagreement(verdicts) == pytest.approx(
        {"disagreement_before": 0.0, "disagreement_after": 1.4142136 / 2}
    )


def test_reward_models_of_two_seeds_disagree_and_one_does_not_with_itself(
    world: World, tmp_path: Path
) -> None:
    config = FEW.model_copy(update={"seed": 1})
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_reward_model(
            config, world.sft, rankings(40, 3), demonstrations(8, 4), tmp_path / "other", metrics
        )
    held_out = rankings(12, seed=99)
    alone = held_out_figures(REWARD, [world.reward], held_out)
    itself = held_out_figures(REWARD, [world.reward] * 2, held_out)
    other = held_out_figures(REWARD, [world.reward, tmp_path / "other"], held_out)
    assert alone["accuracy"] > 0.8
    assert "disagreement" not in alone
    assert itself["disagreement"] == 0.0
    assert other["disagreement"] > 0.01
    assert held_out_figures(REWARD, [world.reward], []) == {}


def test_labelers_are_in_one_group_each_of_nearly_equal_size() -> None:
    raters = [f"rater{i % 7}" for i in range(30)]
    groups = labeler_groups(raters, 3, seed=0)
    assert sorted(map(len, groups)) == [2, 2, 3]
    assert set().union(*groups) == set(raters)
    assert labeler_groups(reversed(raters), 3, seed=0) == groups != labeler_groups(raters, 3, 1)
    with pytest.raises(InvalidInput, match=r"reward_model\.folds: expected at most 7"):
        labeler_groups(raters, 8, seed=0)


def test_a_fold_is_measured_on_labelers_that_it_did_not_learn_from(world: World) -> None:
    """One of three labelers orders everything the other way round."""
    rows = [
        replace(
            row,
            rater_id=f"rater{i % 3}",
            ranks=tuple(max(row.ranks) - r for r in row.ranks) if i % 3 == 0 else row.ranks,
        )
        for i, row in enumerate(rankings(72, seed=3))
    ]
    folds = cross_validate(FEW, world.sft, rows, demonstrations(8, seed=4))
    assert [fold["labelers"] for fold in folds] == [1, 1, 1]
    assert all(fold["pairs"] > 20 for fold in folds)
    contrary, *others = sorted(fold["accuracy"] for fold in folds)
    # Only the others taught the fold that leaves it out, and it was asked alone.
    assert contrary < 0.35
    assert min(others) > contrary + 0.1


class Listener(TorchSampler):
    """Remembers what it was asked and what it answered."""

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        found = super().sample(prompts, max_tokens, seed, samples)
        self.heard = list(zip(prompts, [group[0] for group in found], strict=True))
        return found


def test_ppo_and_evaluation_score_the_same_text_in_a_foreign_reward_models_tokens(
    world: World, foreign: Path, tmp_path: Path
) -> None:
    tokenizer, sampler = load_tokenizer(world.sft), Listener(world.sft)
    asked: list[PromptRow] = [
        replace(row, text="", messages=({"role": "user", "content": row.text},)) if i % 2 else row
        for i, row in enumerate(prompts(10))
    ]
    listening: Any = sampler
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_ppo(
            configured(batch=16, minibatch=8, episodes=16, max_response_tokens=12),
            world.sft,
            foreign,
            asked,
            documents(60, seed=20),
            listening,
            tmp_path / "policy",
            metrics,
        )
    [figures] = read_metrics(tmp_path / "metrics")
    row_of = {tuple(render(tokenizer, row)): row for row in asked}
    texts = [
        str(tokenizer.decode(list(s.token_ids), skip_special_tokens=True)) for _, s in sampler.heard
    ]
    scores = reward_judge(foreign, configured().unfinished_reward)(
        [row_of[tuple(prompt)] for prompt, _ in sampler.heard],
        texts,
        [s.finished for _, s in sampler.heard],
    )
    assert figures["reward"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert len({round(score, 3) for score in scores}) > 3


def test_a_value_network_reads_the_policys_tokens(world: World, foreign: Path) -> None:
    nets = load_networks(world.sft, foreign, prompts(4))
    start = load_policy(world.sft).base_model.state_dict()
    assert nets.value is not None
    value = nets.value.backbone.state_dict()
    assert all(torch.equal(value[name], start[name]) for name in start)
    assert load_networks(world.sft, world.reward).translation is None
    tokenizers = [load_tokenizer(folder) for folder in (world.sft, world.reward, foreign)]
    assert alike(*tokenizers[:2]) and not alike(*tokenizers[1:])


def test_every_epoch_is_kept_where_a_reward_model_chooses(world: World, tmp_path: Path) -> None:
    for name, chosen in (("kept", True), ("last", False)):
        config = SFT.model_copy(update={"epochs": 3, "choose_by_reward": chosen})
        folder = tmp_path / name / "model"
        with closing(Metrics(tmp_path / f"{name}-metrics")) as metrics:
            train_sft(config, world.base, demonstrations(40, 5), [], folder, metrics)
    assert [p.name for p in sorted((tmp_path / "last").iterdir())] == ["model"]
    kept = tmp_path / "kept"
    folders = sorted(p for p in kept.iterdir() if p.name != CHECKPOINTS)
    assert [p.name for p in folders] == ["epoch-1", "epoch-2", "epoch-3", "model"]
    weights = [(p / "model.safetensors").read_bytes() for p in folders]
    assert weights[2] == weights[3] != weights[1] != weights[0]


def test_the_checkpoint_whose_answers_are_liked_has_the_higher_mean_reward(
    world: World, tmp_path: Path
) -> None:
    liked = [replace(row, response=" e e e e e") for row in demonstrations(40, 5)]
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_sft(SFT, world.base, liked, [], tmp_path / "liked", metrics)
    sampler: Any = TorchSampler(world.sft)
    means = mean_rewards(
        EvaluationConfig(samples_per_prompt=1, max_prompts=16),
        sampler,
        [world.sft, tmp_path / "liked"],
        world.reward,
        prompts(16),
        PpoConfig(max_response_tokens=12),
    )
    assert means[1] > means[0] + 0.5
