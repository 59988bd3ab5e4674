"""What PPO learns from where the responses to a prompt are compared with each other."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.letters import TorchSampler, World, prompts
from tests.training.test_ppo import configured, run
from training import experience, ppo
from training.config import Advantage, PpoConfig
from training.experience import by_others, evaluate_rollout
from training.model import Pair, load_policy, load_tokenizer, pack_pairs
from training.networks import Networks, load_networks
from training.packing import Packed
from training.ppo import minibatches, update, usable_prompts
from training.rollout import Rollout, pack

RLOO: dict[str, Any] = {"advantage": "rloo", "samples_per_prompt": 4, "whiten_rewards": False}
GRPO: dict[str, Any] = {**RLOO, "advantage": "grpo"}


@pytest.fixture
def rollout(world: World) -> Rollout:
    """Six prompts with four responses each."""
    ids = usable_prompts(PpoConfig(), load_tokenizer(world.sft), prompts(6))
    samples = TorchSampler(world.sft).sample(ids, 8, seed=1, samples=4)
    return pack(ids, [response for group in samples for response in group], samples=4)


def networks(world: World, advantage: Advantage) -> Networks:
    """The reference is another policy, so that there is a KL."""
    nets = load_networks(world.sft, world.reward, (), advantage)
    return replace(nets, reference=load_policy(world.base).eval().requires_grad_(False))


def of_tokens(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    padded = [row + [0.0] * (width - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([[t < len(r) for t in range(width)] for r in rows])


def test_a_response_is_compared_with_the_others_by_its_whole_reward() -> None:
    # Two prompts, three responses each; whole rewards 1, 2, 6 and 4, 4, 1.
    rewards_BR, mask_BR = of_tokens([[-1.0, 2.0], [2.0], [1, 2, 3], [4.0], [1.0, 3.0], [1.0]])
    config = configured(
        advantage="rloo", samples_per_prompt=3, batch=6, minibatch=6, whiten_rewards=False
    )
    advantages_BR, baselines_BR, returns_BR = by_others(config, rewards_BR, mask_BR)
    assert baselines_BR[:, 0].tolist() == [4.0, 3.5, 1.5, 2.5, 2.5, 4.0]
    assert returns_BR[:, 0].tolist() == [1.0, 2.0, 6.0, 4.0, 4.0, 1.0]
    assert advantages_BR.tolist() == [
        [-3.0, -3.0, 0.0],
        [-1.5, 0.0, 0.0],
        [4.5, 4.5, 4.5],
        [1.5, 0.0, 0.0],
        [1.5, 1.5, 0.0],
        [-3.0, 0.0, 0.0],
    ]


def test_whitened_rewards_have_one_scale_over_all_prompts() -> None:
    # Mean 2, variance (4 + 0 + 1 + 9) / 4, over four responses to two prompts.
    rewards_BR, mask_BR = of_tokens([[4.0], [2.0], [3.0], [-1.0]])
    config = configured(advantage="rloo", samples_per_prompt=2)
    advantages_BR, _, _ = by_others(config, rewards_BR, mask_BR)
    scale = 3.5**0.5
    expected = [2 / scale, -2 / scale, 4 / scale, -4 / scale]
    assert advantages_BR[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_groups_are_normalised_each_by_itself() -> None:
    rewards_BR, mask_BR = of_tokens([[4.0], [2.0], [30.0], [-10.0], [5.0], [5.0]])
    config = configured(
        advantage="grpo", samples_per_prompt=2, batch=6, minibatch=6, whiten_rewards=False
    )
    advantages_BR, baselines_BR, _ = by_others(config, rewards_BR, mask_BR)
    expected = [1.0, -1.0, 1.0, -1.0, 0.0, 0.0]
    assert advantages_BR[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert baselines_BR[:, 0].tolist() == [2.0, 4.0, -10.0, 30.0, 5.0, 5.0]


def test_the_kl_is_part_of_what_is_compared(world: World, rollout: Rollout) -> None:
    config = configured(**RLOO, batch=24, minibatch=8)
    found = evaluate_rollout(config, networks(world, "rloo"), rollout, beta=0.5)
    kl_B = (found.old_logprobs_BR - found.ref_logprobs_BR).sum(1)
    assert kl_B.abs().min() > 0.01
    rewards_BK = (found.scores_B - 0.5 * kl_B).view(6, 4)
    for b in range(24):
        others = [x for k, x in enumerate(rewards_BK[b // 4].tolist()) if k != b % 4]
        expected = rewards_BK.flatten()[b].item() - sum(others) / 3
        length = int(rollout.mask_BR[b].sum())
        assert found.advantages_BR[b, :length].tolist() == pytest.approx([expected] * length)
    assert (found.advantages_BR[~rollout.mask_BR] == 0).all()


def test_a_prompt_is_computed_once_for_its_responses_and_nothing_else_changes(
    world: World, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = networks(world, "gae")
    config, none = configured(batch=24, minibatch=8), torch.zeros(0, 16, dtype=torch.long)
    tokens: list[int] = []

    def counted(pairs: Sequence[Pair], samples: int) -> tuple[Packed, Tensor, Tensor]:
        found = pack_pairs(pairs, samples)
        tokens.append(len(found[0]))
        return found

    for module in (experience, ppo):
        monkeypatch.setattr(module, "pack_pairs", counted)
    found = []
    for samples in (4, 1):
        tokens.clear()
        each = replace(rollout, samples=samples)
        evaluated = evaluate_rollout(config, nets, each, beta=0.5)
        figures = update(config, nets, evaluated, list(range(4, 12)), none)
        weights = [p for network in nets.trained.values() for p in network.parameters()]
        grads = [p.grad.clone() for p in weights if p.grad is not None]
        for weight in weights:
            weight.grad = None
        found.append((evaluated, figures, grads, sum(tokens)))
    shared, apart = found
    for name in ("old_logprobs_BR", "ref_logprobs_BR", "old_values_BR", "scores_B"):
        mine, other = getattr(shared[0], name), getattr(apart[0], name)
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert shared[1] == pytest.approx(apart[1], abs=1e-5)
    for mine, other in zip(shared[2], apart[2], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    # All six prompts and then two of them again, each three times less.
    once = sum(len(prompt) for prompt, _ in (*rollout.pairs[::4], *rollout.pairs[4:12:4]))
    assert apart[3] - shared[3] == 3 * once


def test_there_is_no_value_network_where_responses_are_compared(
    world: World, tmp_path: Path
) -> None:
    nets = load_networks(world.sft, world.reward, (), "rloo")
    assert nets.value is None and list(nets.trained) == ["policy"]
    [row] = run(world, tmp_path / "policy", **GRPO, checkpoint_every=1)
    assert "value_loss" not in row and row["explained_variance"] < 1
    saved = (tmp_path / "checkpoint/policy/1/.metadata").read_bytes()
    assert b"policy" in saved and b"value.backbone" not in saved
    [row] = run(world, tmp_path / "paper", checkpoint_every=1)
    assert "value_loss" in row
    assert b"value.backbone" in (tmp_path / "checkpoint/paper/1/.metadata").read_bytes()


@pytest.mark.parametrize("settings", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_reward_rises_without_a_value_network(
    settings: dict[str, Any], world: World, tmp_path: Path
) -> None:
    rows = run(world, tmp_path / "policy", episodes=32 * 12, policy_rate=2e-3, **settings)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.5
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_the_responses_to_a_prompt_are_in_one_minibatch() -> None:
    config = configured(**RLOO, batch=24, minibatch=8)
    batches = minibatches(config, 24, random.Random(0))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert sorted(i for batch in batches for i in batch) == list(range(24))
    groups = [batch[i : i + 4] for batch in batches for i in (0, 4)]
    assert all(g == list(range(g[0], g[0] + 4)) and g[0] % 4 == 0 for g in groups)
    assert batches != minibatches(config, 24, random.Random(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"advantage": "rloo"},
            "samples_per_prompt: expected 2 or more for rloo to compare, got 1",
        ),
        ({**GRPO, "batch": 30}, "batch: expected a multiple of 4 responses, got 30"),
        ({**GRPO, "minibatch": 6}, "minibatch: expected a multiple of 4 responses, got 6"),
        ({**RLOO, "value_warmup_iterations": 1}, "expected 0 without a value network, got 1"),
        ({**RLOO, "gamma": 0.9}, "gamma: expected 1 for rloo, got 0.9"),
        ({"overlap": True}, "importance_cap: expected > 0 where rollouts overlap, got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configured(**settings)


def test_what_a_response_is_predicted_from_by_hand() -> None:
    packed, at_M, targets_M = pack_pairs(
        [([5, 6], [7, 8]), ([5, 6], [9]), ([1], [2]), ([1], [3])], 2
    )
    # 5 6 | 7 8 | 9 and 1 | 2 | 3: each first token from its prompt's last.
    assert packed.tokens_N.tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert at_M.tolist() == [1, 2, 1, 5, 5]
    assert targets_M.tolist() == [7, 8, 9, 2, 3]
