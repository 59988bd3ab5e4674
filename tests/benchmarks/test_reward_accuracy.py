"""Reward models beside TRL's: whose pairs both see, and what is said of them."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from benchmarks.reward_accuracy import SEEDS, by_worker, figures, pairs_of, tied
from benchmarks.reward_model import of_scorer
from tests import tiny_models
from training.data import RankedRow
from training.reward_model import PairScores, Ranked, score_sequences


def row(worker: str, *ranks: int) -> RankedRow:
    answers = tuple(map(str, ranks))
    return RankedRow("id", "user", "prompt", (), "", worker, answers, (True,) * len(ranks), ranks)


def test_a_worker_is_on_one_side_and_tested_in_one_seed() -> None:
    rows = [row(f"worker-{i % 23}", 0, 1) for i in range(92)]
    tested = list[str]()
    for seed in SEEDS:
        sides = [{r.rater_id for r in side} for side in by_worker(rows, seed)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 23
        assert all(sides)
        tested += sides[-1]
    chooses = {r.rater_id for r in by_worker(rows, SEEDS[0])[1]}
    assert len(tested) == len(set(tested))
    assert chooses.isdisjoint(tested)
    assert all({r.rater_id for r in by_worker(rows, seed)[1]} == chooses for seed in SEEDS)


def test_a_pair_is_the_prompt_with_either_answer_and_a_tie_is_none() -> None:
    ranked = Ranked("user", "worker", [7, 8], [[1], [2], [3]], (1, 0, 1))
    assert pairs_of([ranked]) == [
        {"chosen_ids": [7, 8, 2], "rejected_ids": [7, 8, 1]},
        {"chosen_ids": [7, 8, 2], "rejected_ids": [7, 8, 3]},
    ]
    # One of three pairs, and all three.
    assert tied([row("a", 1, 0, 1), row("b", 0, 0, 0)]) == 4 / 6


def test_our_model_scores_as_the_one_that_trl_saved(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "base", 1, tied=True)
    scorer = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=1)
    texts = torch.tensor([[5, 6, 7, 0], [9, 3, 2, 0]])
    with torch.no_grad():
        theirs = scorer.eval()(texts).logits[:, 0]
    scorer.save_pretrained(tmp_path / "saved")
    saved = LlamaForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert theirs.unique().numel() == 2
    torch.testing.assert_close(score_sequences(of_scorer(saved), texts.tolist()), theirs)


def test_the_difference_is_of_the_same_pairs_and_its_interval_of_whole_workers() -> None:
    # Right in 3 of 4 and in 1.5 of 2, against 2 of 4 and 2 of 2: +25 and -25 points. Of the six
    # pairs, worker a's two gain 200 points, b's two -100, and c's two -50.
    ours = [
        PairScores((1.0, 1.0, 1.0, -1.0), ("a", "a", "b", "b")),
        PairScores((1.0, 0.0), ("c", "c")),
    ]
    trl = [
        PairScores((-1.0, -1.0, 1.0, 1.0), ("a", "a", "b", "b")),
        PairScores((1.0, 1.0), ("c", "c")),
    ]
    found = {f.figure: f for f in figures(ours, trl)}
    over, interval = found["accuracy_over_trl"], found["accuracy_over_trl_ci95"]
    assert (over.value, over.min, over.max, over.goal) == (0.0, -25.0, 25.0, ">= 0")
    assert interval.value == pytest.approx(50 / 6)
    # The same worker three times: the least is b's mean, the greatest a's.
    assert (interval.min, interval.max) == (-50.0, 100.0)
    assert (found["accuracy_ours"].min, found["accuracy_ours"].max) == (0.75, 0.75)
    assert found["tested_workers"].max == 2
