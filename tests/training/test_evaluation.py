"""Intervals, win rates, divergence and language modelling, against figures from elsewhere."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.training.letters import TorchSampler, World, prompts
from training.config import EvaluationConfig, PpoConfig
from training.data import PromptRow
from training.evaluation.comparison import (
    Answers,
    Comparison,
    compare,
    judge_by,
    kl_between,
    language_model_loss,
)
from training.evaluation.interval import clustered_mean
from training.model import load_policy, load_tokenizer
from training.rollout import Sampled


def test_interval_of_two_people_by_hand() -> None:
    # Two people are drawn from two: 0.0 twice (1/4), both (1/2) or 1.0 twice (1/4), so both ends
    # are extreme.
    interval = clustered_mean([0.0, 0.0, 1.0], ["alice", "alice", "bob"])
    assert interval.mean == pytest.approx(1 / 3)
    assert interval.ci95 == [0.0, 1.0]


def test_what_one_person_says_often_does_not_narrow_the_interval() -> None:
    values = [0.0, 1.0, 0.0, 1.0]
    few = clustered_mean(values, list("abcd"))
    repeated = clustered_mean(values * 25, list("abcd") * 25)
    assert repeated == few
    apart = clustered_mean(values * 25, [str(i) for i in range(100)])
    assert apart.high - apart.low < (few.high - few.low) / 2
    # 100 independent coins: 1.96 standard errors of 0.05 on either side.
    assert apart.low == pytest.approx(0.402, abs=0.02)
    assert apart.high == pytest.approx(0.598, abs=0.02)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        clustered_mean([], [])


def comparison_of(before: list[list[str]], after: list[list[str]]) -> Comparison:
    def answers(texts: list[list[str]]) -> Answers:
        return Answers([[Sampled((1,), (0.0,), True) for _ in group] for group in texts], texts)

    rows = [PromptRow(f"p{i}", f"user{i}", "Q", (), "chat") for i in range(len(before))]
    return Comparison(rows, [[5]] * len(rows), answers(before), answers(after))


def test_a_tie_is_half_a_win() -> None:
    # On the first prompt 1.5 of 4 pairs are won: 2 beats 1 and ties with 2, 0 loses to both.
    # On the second all are.
    comparison = comparison_of([["x", "xx"], ["", ""]], [["xx", ""], ["xxx", "xxx"]])
    verdict = judge_by(lambda rows, texts, done: [float(len(t)) for t in texts], comparison)
    assert verdict.win_rate.mean == pytest.approx((0.375 + 1.0) / 2)
    assert verdict.before == [[1.0, 2.0], [0.0, 0.0]]
    assert verdict.after == [[2.0, 0.0], [3.0, 3.0]]


def test_a_policy_against_itself_neither_wins_nor_diverges(world: World) -> None:
    sampler: Any = TorchSampler(world.sft)
    evaluation = EvaluationConfig(samples_per_prompt=3, max_prompts=10)
    comparison = compare(
        evaluation, sampler, world.sft, world.sft, prompts(40), PpoConfig(max_response_tokens=8)
    )
    assert [row.id for row in comparison.rows] == [f"p{i}" for i in range(0, 40, 4)]
    assert kl_between(world.sft, world.sft, comparison) == 0.0
    assert comparison.before.samples != comparison.after.samples
    assert "<|endoftext|>" not in "".join(t for group in comparison.after.texts for t in group)


def test_kl_is_what_the_samples_say(world: World) -> None:
    sampler: Any = TorchSampler(world.sft)
    evaluation = EvaluationConfig(samples_per_prompt=2, max_prompts=5)
    comparison = compare(
        evaluation, sampler, world.sft, world.base, prompts(5), PpoConfig(max_response_tokens=8)
    )
    base, sft, total = load_policy(world.base), load_policy(world.sft), 0.0
    for prompt, group in zip(comparison.prompts, comparison.after.samples, strict=True):
        for sample in group:
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            for sign, model in ((1, base), (-1, sft)):
                with torch.no_grad():
                    logits_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
                taken = logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
                total += sign * taken.sum().item()
    assert kl_between(world.base, world.sft, comparison) == pytest.approx(total / 10, abs=1e-4)


def test_language_model_loss_is_the_log_of_the_perplexity(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "tiny", 0, tied=True)
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    texts = ["Write one sentence.", "List three colours, separated by commas, and stop."]
    product, tokens = 1.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:9]
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        for i in range(1, len(ids)):
            product, tokens = product * probabilities[i - 1, ids[i]].item(), tokens + 1
    perplexity = product ** (-1 / tokens)
    # A document of one token says nothing and is left out.
    loss = language_model_loss(folder, [*texts, "W"], max_tokens=9)
    assert loss == pytest.approx(math.log(perplexity), abs=1e-5)
