"""A reward model learns a toy preference, has demonstrations at zero, and is measured by hand-made
figures.
"""

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.errors import InvalidInput
from tests.training.letters import REWARD, World, demonstrations, rankings
from training.config import RewardModelConfig
from training.kernels import ranking_loss
from training.metrics import Metrics, read_metrics
from training.model import load_tokenizer
from training.packing import Tree
from training.reward_head import RewardModel
from training.reward_model import (
    PairScores,
    _score,
    calibration,
    demonstration_sequences,
    encode_rankings,
    mean_score,
    score_pairs,
    score_sequences,
    score_trees,
    train_reward_model,
)


def test_it_orders_held_out_answers(world: World) -> None:
    ranked = encode_rankings(REWARD, load_tokenizer(world.reward), rankings(40, seed=99))
    scores = score_pairs(RewardModel.load(world.reward).eval(), ranked)
    assert scores.accuracy > 0.9
    strict = sum(a < b for r in ranked for a in r.ranks for b in r.ranks)
    assert len(scores.gaps) == len(scores.raters) == strict
    assert set(scores.raters) <= {f"rater{i}" for i in range(5)}


def test_it_learns_rankings_as_choices_too(world: World, tmp_path: Path) -> None:
    config = REWARD.model_copy(update={"ranking": "plackett_luce"})
    learned, zero = rankings(128, seed=3), demonstrations(32, seed=4)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_reward_model(config, world.sft, learned, zero, tmp_path / "reward", metrics)
    ranked = encode_rankings(config, load_tokenizer(world.sft), rankings(40, seed=99))
    assert score_pairs(RewardModel.load(tmp_path / "reward").eval(), ranked).accuracy > 0.9
    # Four answers: the first of up to four is chosen, so a model that knows nothing has a higher
    # loss than over pairs, where it is log 2 = 0.69.
    first = read_metrics(tmp_path / "metrics")[0]["loss"]
    assert first > 0.8


def test_demonstrations_score_zero_on_average(world: World) -> None:
    model, tokenizer = RewardModel.load(world.reward).eval(), load_tokenizer(world.reward)
    sequences = demonstration_sequences(REWARD, tokenizer, demonstrations(32, seed=4))
    assert mean_score(model, sequences) == pytest.approx(0.0, abs=1e-5)
    assert abs(model.shift.item()) > 1e-3  # so that the check above could have failed


def test_the_same_text_has_the_same_score_in_any_batch(world: World) -> None:
    model = RewardModel.load(world.reward).eval()
    sequences = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5, 6, 7], [9]]
    trees = [Tree(s) for s in sequences]
    together = score_trees(model, trees, tokens=12).tolist()
    alone = [score_sequences(model, [s]).item() for s in sequences]
    assert together == pytest.approx(alone, abs=1e-5)


def test_one_epoch_shows_each_prompt_once(world: World, tmp_path: Path) -> None:
    rows, config = rankings(20, seed=6), RewardModelConfig(prompts_per_batch=8)
    usable = encode_rankings(config, load_tokenizer(world.sft), rows)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_reward_model(
            config, world.sft, rows, demonstrations(4, 7), tmp_path / "reward", metrics
        )
    assert len(read_metrics(tmp_path / "metrics")) == math.ceil(len(usable) / 8)


def test_rankings_without_a_strict_pair_or_too_long_are_dropped(world: World) -> None:
    tokenizer, row = load_tokenizer(world.sft), rankings(1, seed=3)[0]
    kept, tied = replace(row, ranks=(0, 1, 1, 2)), replace(row, ranks=(0, 0, 0, 0))
    long = replace(kept, responses=(" a" * 50, *row.responses[1:]))
    config = RewardModelConfig(max_response_tokens=20)
    [only] = encode_rankings(config, tokenizer, [tied, kept, long])
    assert only.ranks == (0, 1, 1, 2)
    cut = replace(kept, finished=(False, True, True, True))
    [ranked] = encode_rankings(config, tokenizer, [cut])
    ends = [response[-1] == tokenizer.eos_token_id for response in ranked.responses]
    assert ends == [False, True, True, True]


def test_a_batch_of_rankings_of_two_sizes(world: World) -> None:
    tokenizer, [first, second] = load_tokenizer(world.sft), rankings(2, seed=3)
    first = replace(first, ranks=(3, 0, 2, 1))
    second = replace(second, responses=second.responses[:2], finished=(True, True), ranks=(1, 0))
    ranked = encode_rankings(REWARD, tokenizer, [first, second])
    model = RewardModel.load(world.reward).eval()
    with torch.no_grad():
        scores_BK, ranks_BK, mask_BK = _score(model, ranked)
        apart = [ranking_loss(*_score(model, [r])).item() for r in ranked]
    assert mask_BK.tolist() == [[True] * 4, [True, True, False, False]]
    expected = [
        score_sequences(model, [[*r.prompt, *a] for a in r.responses]).tolist() for r in ranked
    ]
    assert scores_BK[0].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert scores_BK[1, :2].tolist() == pytest.approx(expected[1], rel=1e-5, abs=1e-5)
    together = ranking_loss(scores_BK, ranks_BK, mask_BK).item()
    assert together == pytest.approx(sum(apart) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "demonstration_rows", "field"),
    [(0, 4, "reward model rankings"), (4, 0, "demonstrations"), (4, 4, "demonstrations")],
)
def test_nothing_usable_is_refused(
    world: World, tmp_path: Path, rows: int, demonstration_rows: int, field: str
) -> None:
    # In the last case the demonstrations are too long, the answers are not.
    long = [replace(d, response=" a" * 200) for d in demonstrations(demonstration_rows, seed=1)]
    config = RewardModelConfig(max_response_tokens=100)
    refused = pytest.raises(InvalidInput, match=field)
    with closing(Metrics(tmp_path / "metrics")) as metrics, refused:
        train_reward_model(config, world.sft, rankings(rows, 3), long, tmp_path / "r", metrics)


def test_a_gap_of_zero_counts_half() -> None:
    assert PairScores((2.0, -1.0, 0.0, 0.5), ("a", "a", "b", "b")).accuracy == 2.5 / 4


def test_calibration_by_hand() -> None:
    # By size: 0 and -1, then 2 and 3. sigmoid(0) = 0.5, (1) = 0.7310586, (2) = 0.8807971, (3) =
    # 0.9525741.
    low, high = calibration([3.0, -1.0, 0.0, 2.0], bins=2)
    assert low == pytest.approx(
        {"gap": 0.5, "predicted": (0.5 + 0.7310586) / 2, "observed": 0.25, "pairs": 2}
    )
    assert high == pytest.approx(
        {"gap": 2.5, "predicted": (0.8807971 + 0.9525741) / 2, "observed": 1.0, "pairs": 2}
    )
    assert [b["pairs"] for b in calibration([1.0] * 11, bins=4)] == [2, 3, 3, 3]
    assert len(calibration([1.0], bins=8)) == 1
