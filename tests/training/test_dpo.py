"""DPO on the toy world: its gradient is the loss's own, and it learns what raters like."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.errors import InvalidInput
from tests.training.letters import TorchSampler, World, prompts, rankings
from training.config import DpoConfig
from training.data import render_all
from training.dpo import accumulate_gradients, log_likelihoods, pairs_of, train_dpo
from training.metrics import Metrics, read_metrics
from training.model import load_policy, load_tokenizer
from training.reward_model import encode_rankings

SMALL = DpoConfig(beta=0.1, epochs=4, prompts_per_batch=16, learning_rate=1e-3)


def letters_e(world: World, policy: Path) -> float:
    """Mean number of letters e, which raters like, in an answer of this policy."""
    tokenizer = load_tokenizer(world.sft)
    sampler = TorchSampler(policy)
    found = sampler.sample(render_all(tokenizer, prompts(64)), max_tokens=12, seed=5)
    return sum(tokenizer.decode(list(s.token_ids)).count("e") for [s] in found) / len(found)


def test_the_gradient_is_that_of_the_pairs_written_out(world: World) -> None:
    model = load_policy(world.sft).eval()
    rows = rankings(3, seed=7)
    ranked = encode_rankings(SMALL, load_tokenizer(world.sft), rows)
    assert len(ranked) > 1
    pairs = pairs_of(ranked)
    reference_P = log_likelihoods(model, pairs, "fp32") + torch.linspace(-2, 2, len(pairs))
    figures = accumulate_gradients(SMALL, model, ranked, reference_P)
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    rewards, losses = [], []
    for (prompt, response), reference in zip(pairs, reference_P, strict=True):
        logits_TV = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        logprobs_TV = logits_TV.log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        said = sum(logprobs_TV[t, token] for t, token in zip(at, response, strict=True))
        rewards.append(0.1 * (said - reference))
    waiting = iter(rewards)
    for r in ranked:
        own = list(zip(r.ranks, [next(waiting) for _ in r.ranks], strict=True))
        each = [-torch.log(torch.sigmoid(x - y)) for a, x in own for b, y in own if a < b]
        losses.append(torch.stack(each).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    assert figures["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for ours, p in zip(got, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-5)


def test_a_policy_without_a_reward_model_learns_what_raters_like(
    world: World, tmp_path: Path
) -> None:
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_dpo(SMALL, world.sft, rankings(128, seed=3), tmp_path / "policy", metrics)
    steps = read_metrics(tmp_path / "metrics")
    # Before the first step the policy is its reference: -log sigmoid(0).
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-4)
    assert steps[-1]["loss"] < 0.6
    assert letters_e(world, tmp_path / "policy") > 1.3 * letters_e(world, world.sft)


def test_rankings_of_ties_alone_are_refused(world: World, tmp_path: Path) -> None:
    tied = [replace(row, ranks=(0, 0, 0, 0)) for row in rankings(4, seed=3)]
    refused = pytest.raises(InvalidInput, match="DPO rankings")
    with closing(Metrics(tmp_path / "metrics")) as metrics, refused:
        train_dpo(SMALL, world.sft, tied, tmp_path / "policy", metrics)
