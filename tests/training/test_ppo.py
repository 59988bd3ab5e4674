"""PPO-ptx on the toy world: what holds at step 0, what one step is made of, and what a run does."""

import copy
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.errors import InvalidInput
from tests.training.letters import TorchSampler, World, documents, prompts
from training import experience as experience_module
from training import likelihood
from training.config import EvaluationConfig, GateConfig, PpoConfig
from training.data import TokenStream, render
from training.evaluation.comparison import (
    compare,
    judge_by,
    kl_between,
    language_model_loss,
    reward_judge,
)
from training.experience import Experience, evaluate_rollout
from training.gate import decide
from training.metrics import Metrics, mean_of, read_metrics
from training.model import load_policy, load_tokenizer
from training.networks import Networks, load_networks
from training.optimizer import adam, average_weights, warmup_share
from training.ppo import train_ppo, update, usable_prompts
from training.reward_model import score_sequences
from training.rollout import Sampled, pack

SMALL = PpoConfig(
    episodes=32,
    batch=32,
    minibatch=32,
    policy_rate=1e-3,
    value_rate=1e-3,
    warmup_iterations=0,
    beta=0.1,
    ptx_coefficient=0.5,
    ptx_examples_per_episode=1,
    ptx_row_tokens=16,
    ema=0.0,
    max_response_tokens=8,
)


def configured(**changes: Any) -> PpoConfig:
    return PpoConfig(**{**SMALL.model_dump(), **changes})


def run(world: World, folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Train into `folder`; the rows of its metrics."""
    sampler: Any = TorchSampler(world.sft)
    beside = folder.with_name(f"{folder.name}-metrics")
    with closing(Metrics(beside)) as metrics:
        train_ppo(
            configured(**changes),
            world.sft,
            world.reward,
            prompts(40),
            documents(60, seed=20),
            sampler,
            folder,
            metrics,
        )
    return read_metrics(beside)


@pytest.fixture
def nets(world: World) -> Networks:
    return load_networks(world.sft, world.reward)


@pytest.fixture
def experience(world: World, nets: Networks) -> Experience:
    ids = usable_prompts(SMALL, load_tokenizer(world.sft), prompts(16))
    samples = TorchSampler(world.sft).sample(ids, 8, seed=1)
    return evaluate_rollout(SMALL, nets, pack(ids, [s[0] for s in samples]), SMALL.beta)


@pytest.fixture
def text_rows(world: World) -> Tensor:
    tokenizer = load_tokenizer(world.sft)
    ids = tokenizer(documents(20, seed=3), add_special_tokens=False)["input_ids"]
    return TokenStream(ids, tokenizer.eos_token_id, 16, seed=0).take(4)


def models(nets: Networks) -> list[torch.nn.Module]:
    return [*nets.trained.values(), nets.reference, nets.reward]


def gradients(nets: Networks) -> list[Tensor]:
    grads = [p.grad.clone() for p in nets.policy.parameters() if p.grad is not None]
    nets.policy.zero_grad()
    return grads


def test_before_any_update_ratio_is_one_and_kl_zero(world: World, tmp_path: Path) -> None:
    [row] = run(world, tmp_path / "policy")
    assert row["ratio_min"] == pytest.approx(1, abs=1e-6)
    assert row["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert row["kl"] == 0.0
    assert row["clip_fraction"] == 0.0
    assert row["ptx_loss"] > 0
    assert row["logprob_mismatch_max"] < 1e-4
    asked = {"reward_p10", "reward_p90", "length", "eos_rate", "explained_variance", "entropy"}
    assert asked <= row.keys()


def test_ratio_is_one_in_ragged_minibatches(nets: Networks, experience: Experience) -> None:
    for indices in ([3], [0, 7, 2], list(range(16))):
        figures = update(SMALL, nets, experience, indices, torch.zeros(0, 16, dtype=torch.long))
        assert figures["ratio_min"] == pytest.approx(1, abs=1e-5)
        assert figures["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_one_step_holds_the_gradients_of_both_losses(
    nets: Networks, experience: Experience, text_rows: Tensor
) -> None:
    indices = list(range(16))
    update(configured(ptx_coefficient=27.8), nets, experience, indices, text_rows)
    both = gradients(nets)
    update(configured(ptx_coefficient=0.0), nets, experience, indices, text_rows)
    ppo = gradients(nets)
    logits_PTV = nets.policy(input_ids=text_rows).logits[:, :-1]
    (27.8 * F.cross_entropy(logits_PTV.flatten(0, 1), text_rows[:, 1:].flatten())).backward()
    ptx = gradients(nets)
    for together, a, b in zip(both, ppo, ptx, strict=True):
        torch.testing.assert_close(together, a + b, atol=1e-5, rtol=1e-4)
    assert any((g != 0).any() for g in ppo)


def test_without_a_coefficient_the_pretraining_text_changes_nothing(
    nets: Networks, experience: Experience, text_rows: Tensor
) -> None:
    config = configured(ptx_coefficient=0.0)
    update(config, nets, experience, [0, 1, 2], text_rows)
    with_text = gradients(nets)
    update(config, nets, experience, [0, 1, 2], text_rows[:0])
    without = gradients(nets)
    assert all(torch.equal(a, b) for a, b in zip(with_text, without, strict=True))


def test_only_policy_and_value_have_gradients(
    nets: Networks, experience: Experience, text_rows: Tensor
) -> None:
    update(SMALL, nets, experience, [0, 1], text_rows)
    assert all(p.grad is None for m in (nets.reference, nets.reward) for p in m.parameters())
    assert nets.value is not None and nets.value.head.weight.grad is not None
    assert not any(m.training for n in models(nets) for m in n.modules())


def test_rewards_come_from_the_shifted_score_at_the_last_token(
    world: World, nets: Networks, experience: Experience
) -> None:
    rollout = experience.rollout
    for b in (0, 5):
        ids = [*rollout.pairs[b][0], *rollout.pairs[b][1]]
        score = score_sequences(nets.reward, [ids]).item()
        assert ids[-1] == load_tokenizer(world.sft).eos_token_id
        assert experience.scores_B[b].item() == pytest.approx(score, abs=1e-5)
    outside = ~rollout.mask_BR
    for figure in (experience.advantages_BR, experience.returns_BR, experience.old_values_BR):
        assert (figure[outside] == 0).all()
    inside = experience.advantages_BR[rollout.mask_BR]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_a_return_is_the_discounted_score(nets: Networks, experience: Experience) -> None:
    # Policy and reference agree here, so the score at the last token is the only reward.
    config = configured(gamma=0.9, lam=1.0, whiten_rewards=False)
    again = evaluate_rollout(config, nets, experience.rollout, config.beta)
    for b, mask_R in enumerate(again.rollout.mask_BR):
        length, score = int(mask_R.sum()), again.scores_B[b].item()
        expected = [score * 0.9 ** (length - 1 - t) for t in range(length)]
        assert again.returns_BR[b, :length].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_token_weighs_as_often_as_the_trainer_would_have_drawn_it(
    nets: Networks, experience: Experience
) -> None:
    drawn, mask_BR = experience.rollout, experience.rollout.mask_BR
    # For the engine every first token was half as likely as for the trainer, every other one twice.
    engine_BR = experience.old_logprobs_BR + math.log(2)
    engine_BR[:, 0] -= 2 * math.log(2)
    rollout = replace(drawn, engine_logprobs_BR=engine_BR)

    def advantages(cap: float) -> Tensor:
        return evaluate_rollout(configured(importance_cap=cap), nets, rollout, 0.1).advantages_BR

    plain_BR = advantages(0.0)
    for cap, first in ((4.0, 2.0), (1.25, 1.25)):
        weights_BR = advantages(cap) / plain_BR
        assert weights_BR[:, 0].tolist() == pytest.approx([first] * len(drawn), rel=1e-4)
        others = weights_BR[:, 1:][mask_BR[:, 1:]].tolist()
        assert others == pytest.approx([0.5] * len(others), rel=1e-4)


def test_a_value_belongs_to_the_state_before_its_token(nets: Networks) -> None:
    def values(response: tuple[int, ...]) -> list[float]:
        episode = pack([[5, 6, 7]], [Sampled(response, (0.0, 0.0), True)])
        found: list[float] = evaluate_rollout(SMALL, nets, episode, 0.1).old_values_BR[0].tolist()
        return found

    assert nets.value is not None
    before = values((8, 9))
    prefixes = score_sequences(nets.value, [[5, 6, 7], [5, 6, 7, 8]]).tolist()
    assert before == pytest.approx(prefixes, abs=1e-6)
    assert values((8, 50)) == before


def test_how_many_passes_a_minibatch_takes_changes_nothing(
    nets: Networks, experience: Experience, monkeypatch: pytest.MonkeyPatch, text_rows: Tensor
) -> None:
    found = []
    for tokens in (2048, 40, 1):
        monkeypatch.setattr(experience_module, "PASS_TOKENS", tokens)
        monkeypatch.setattr(likelihood, "PASS_TOKENS", tokens)
        figures = update(SMALL, nets, experience, list(range(16)), text_rows)
        found.append((figures, gradients(nets)))
    for figures, grads in found[1:]:
        assert figures == pytest.approx(found[0][0], abs=1e-5)
        for mine, other in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_a_response_that_never_stops_gets_the_fixed_reward(nets: Networks) -> None:
    rollout = pack(
        [[5, 6]] * 2, [Sampled((7, 8, 0), (0.0,) * 3, finished=f) for f in (True, False)]
    )
    scores_B = evaluate_rollout(configured(unfinished_reward=-3.5), nets, rollout, 0.1).scores_B
    assert scores_B[1].item() == -3.5
    assert scores_B[0].item() != -3.5


def test_average_of_weights_by_hand() -> None:
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        average.weight.fill_(1.0)
        model.weight.fill_(2.0)
    average_weights(average, model, 0.75)
    assert average.weight.item() == 1.25
    average_weights(average, model, 0.75)
    assert average.weight.item() == 1.4375


def test_the_average_is_what_is_saved(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "none", ema=0.0)
    run(world, tmp_path / "half", ema=0.5)
    start, new, half = (
        load_policy(f).state_dict() for f in (world.sft, tmp_path / "none", tmp_path / "half")
    )
    for name in start:
        torch.testing.assert_close(half[name], (start[name] + new[name]) / 2, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(start[name], new[name]) for name in start)


def test_the_policy_stands_still_while_the_value_warms_up(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "policy", value_warmup_iterations=1)
    before, after = (
        load_policy(world.sft).state_dict(),
        load_policy(tmp_path / "policy").state_dict(),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_kl_budget_stops_the_run(world: World, tmp_path: Path) -> None:
    rows = run(world, tmp_path / "p", episodes=32 * 12, beta=0.0, policy_rate=5e-3, kl_budget=0.3)
    assert 1 < len(rows) < 12
    assert rows[-1]["kl"] > 0.3
    assert all(row["kl"] <= 0.3 for row in rows[:-1])
    assert "policy_loss" not in rows[-1]


def test_an_adaptive_beta_rises_until_the_kl_falls(world: World, tmp_path: Path) -> None:
    changes = {"episodes": 32 * 14, "policy_rate": 2e-3, "beta": 0.01}
    free = run(world, tmp_path / "fixed", **changes)
    adaptive = {"kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 8}
    held = run(world, tmp_path / "adaptive", **changes, **adaptive)
    assert {row["beta"] for row in free} == {0.01}
    assert [row["kl"] for row in held[:2]] == [row["kl"] for row in free[:2]]
    assert held[-1]["beta"] > 5 * 0.01
    print(
        [(round(r["kl"], 2), round(r["beta"], 2)) for r in held], [round(r["kl"], 2) for r in free]
    )
    assert sum(r["kl"] for r in held[-3:]) < 0.8 * sum(r["kl"] for r in free[-3:])


def test_the_same_seed_gives_the_same_policy(world: World, tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(world, tmp_path / name, seed=seed)
        states.append(load_policy(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_reward_rises_and_reference_and_reward_model_stay(world: World, tmp_path: Path) -> None:
    before = [(f / "model.safetensors").read_bytes() for f in (world.sft, world.reward)]
    rows = run(world, tmp_path / "policy", episodes=32 * 12, policy_rate=2e-3)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.5
    after = [(f / "model.safetensors").read_bytes() for f in (world.sft, world.reward)]
    assert before == after


def test_prompts_that_are_too_long_are_left_out(world: World) -> None:
    tokenizer, rows = load_tokenizer(world.sft), prompts(3)
    rows[1] = replace(rows[1], text="Letters " * 40)
    kept = usable_prompts(configured(max_prompt_tokens=30), tokenizer, rows)
    assert kept == [render(tokenizer, rows[0]), render(tokenizer, rows[2])]
    with pytest.raises(InvalidInput, match="PPO prompts"):
        usable_prompts(configured(max_prompt_tokens=1), tokenizer, rows)


def test_adam_is_the_papers() -> None:
    [group] = adam([torch.nn.Parameter(torch.zeros(1))], 1e-3, eps=1e-5).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-5, 0.0)


def test_rate_rises_from_a_tenth_over_ten_iterations() -> None:
    assert [warmup_share(i, 10) for i in (0, 5, 10, 500)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert warmup_share(0, 0) == 1.0


def test_extremes_stay_extremes_over_minibatches() -> None:
    steps = [{"ratio_min": 0.5, "ratio_max": 1.1, "policy_loss": 1.0}]
    steps.append({"ratio_min": 0.9, "ratio_max": 1.7, "policy_loss": 2.0})
    assert mean_of(steps) == {"ratio_min": 0.5, "ratio_max": 1.7, "policy_loss": 1.5}


def test_the_papers_numbers_are_the_defaults() -> None:
    config = PpoConfig()
    assert (config.episodes, config.batch, config.minibatch) == (256_000, 512, 64)
    assert (config.inner_epochs, config.clip, config.gamma, config.lam) == (1, 0.2, 1.0, 0.95)
    assert (config.beta, config.ema, config.value_rate) == (0.02, 0.992, 9e-6)
    # The adaptive controller's are of lm-human-preferences.
    assert (config.kl_controller, config.kl_target, config.kl_horizon) == ("fixed", 6.0, 10_000)
    assert (config.ptx_coefficient, config.ptx_examples_per_episode) == (27.8, 8)
    assert (config.warmup_iterations, config.adam_eps) == (10, 1e-5)


def test_networks_are_four_models_that_share_nothing(nets: Networks) -> None:
    seen = [p.data_ptr() for n in models(nets) for p in n.parameters()]
    assert len(set(seen)) == len(seen)
    assert nets.value is not None and len(models(nets)) == 4
    value, reward = copy.deepcopy(nets.value.state_dict()), nets.reward.state_dict()
    assert all(torch.equal(value[k], reward[k]) for k in reward)


def test_a_policy_trained_too_long_without_a_kl_penalty_is_refused(
    world: World, tmp_path: Path
) -> None:
    """Over-optimised for real: it says what the reward model likes and has forgotten how to write
    the rest.
    """
    long, short = tmp_path / "long", tmp_path / "short"
    run(
        world,
        long,
        episodes=32 * 30,
        beta=0.0,
        ptx_coefficient=0.0,
        ptx_examples_per_episode=0,
        policy_rate=5e-3,
    )
    run(world, short, episodes=32 * 3, beta=0.1, policy_rate=1e-3)
    # By the reward model that it exploits it wins: that is no reason to release it.
    gate = GateConfig(max_kl=3.0, max_lm_loss_rise=0.1, min_win_rate=0.3)
    sampler: Any = TorchSampler(world.sft)
    held_out = documents(60, seed=77)
    parent_loss = language_model_loss(world.sft, held_out, 64)

    def reasons(folder: Path) -> list[str]:
        evaluation = EvaluationConfig(samples_per_prompt=2, max_prompts=32)
        comparison = compare(
            evaluation, sampler, world.sft, folder, prompts(32), PpoConfig(max_response_tokens=8)
        )
        win_rate = judge_by(reward_judge(world.reward, -1.0), comparison).win_rate
        kl = kl_between(folder, world.sft, comparison)
        rise = language_model_loss(folder, held_out, 64) - parent_loss
        assert math.isfinite(kl) and math.isfinite(rise)
        return list(decide(gate, win_rate, 5, kl, rise).reasons)

    refused = reasons(long)
    assert [r.split(":")[0] for r in refused] == ["KL to the parent", "held-out language modelling"]
    assert not [r for r in reasons(short) if r.startswith("KL")]
