"""Details of the recipe that no other test would miss; docs/recipe.md names a test for each."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from tests.training.letters import (
    REWARD,
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from tests.training.test_ppo import configured, run
from training import experience, kernels, reward_model
from training.config import RewardModelConfig, SftConfig
from training.metrics import Metrics, read_metrics
from training.model import load_tokenizer, save_policy
from training.optimizer import step
from training.ppo import train_ppo
from training.reward_head import RewardModel
from training.reward_model import accumulate_gradients, encode_rankings, train_reward_model
from training.rollout import Sampled, Sampler


class Recorder(TorchSampler):
    """Remembers the seed of every call and the weights that it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seeds: list[int] = []
        self.weights: list[Tensor] = []

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.weights.append(next(iter(state.values())).clone())

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        self.seeds.append(seed)
        return super().sample(prompts, max_tokens, seed, samples)


def test_every_iteration_samples_on_its_own_weights_with_a_seed_of_its_own(
    world: World, tmp_path: Path
) -> None:
    sampler: Any = Recorder(world.sft)
    config = configured(episodes=32 * 3, policy_rate=5e-3)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_ppo(
            config,
            world.sft,
            world.reward,
            prompts(40),
            documents(60, seed=20),
            sampler,
            tmp_path / "policy",
            metrics,
        )
    assert len(set(sampler.seeds)) == 3
    first, second, third = sampler.weights
    assert not torch.equal(first, second) and not torch.equal(second, third)
    # Had the sampler gone on with old weights, it would disagree with the trainer.
    assert all(row["logprob_mismatch_max"] < 1e-4 for row in read_metrics(tmp_path / "metrics"))


def test_a_rollout_is_evaluated_once_however_often_it_is_learned_from(
    world: World, tmp_path: Path
) -> None:
    [row] = run(world, tmp_path / "policy", inner_epochs=2, policy_rate=5e-3)
    # In the second pass the policy is no longer the one that sampled.
    assert row["ratio_max"] > 1.01
    assert row["ratio_min"] < 0.99


def test_the_value_network_learns_at_a_rate_of_its_own(world: World, tmp_path: Path) -> None:
    # While the value warms up the policy's rate is 0.
    still, moving = (
        run(
            world,
            tmp_path / name,
            episodes=32 * 6,
            value_warmup_iterations=6,
            value_rate=rate,
            whiten_rewards=False,
        )
        for name, rate in (("still", 1e-9), ("moving", 3e-3))
    )
    assert moving[0]["value_loss"] == pytest.approx(still[0]["value_loss"], rel=1e-3)
    assert moving[-1]["value_loss"] < still[-1]["value_loss"]


def test_weights_and_their_average_stay_in_float32_under_bf16(world: World, tmp_path: Path) -> None:
    # An average in bf16 would not move: 0.8 % of a small step is below its resolution.
    run(world, tmp_path / "policy", precision="bf16", ema=0.992)
    before, after = (load_file(f / "model.safetensors") for f in (world.sft, tmp_path / "policy"))
    assert {str(tensor.dtype) for tensor in after.values()} == {"torch.float32"}
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 1e-3


def test_a_step_is_cut_to_the_largest_norm() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert step(model, optimizer, max_norm=1.0).item() == pytest.approx(5.0)
    moved = before - model.weight.detach()
    assert moved[0].tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
    assert model.weight.grad is None


def test_sampling_is_at_temperature_one_with_top_k_off_and_top_p_one() -> None:
    asked = []

    def generate(requests: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        asked.append(params)
        return [SimpleNamespace(outputs=[]) for _ in requests]

    sampler = Sampler.__new__(Sampler)  # without an engine
    vars(sampler)["_llm"] = SimpleNamespace(generate=generate)
    sampler.sample([[1, 2]], 8, seed=0)
    [[params]] = asked
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert (params.repetition_penalty, params.logprobs) == (1.0, 0)


def test_no_dropout_while_the_reward_model_learns(world: World, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world.sft)
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.5
    save_policy(AutoModelForCausalLM.from_config(sizes), tokenizer, tmp_path / "gpt2")
    rows = rankings(6, seed=6)
    config = RewardModelConfig(seed=3)
    with closing(Metrics(tmp_path / "metrics")) as metrics:
        train_reward_model(
            config, tmp_path / "gpt2", rows, demonstrations(4, 7), tmp_path / "reward", metrics
        )
    torch.manual_seed(config.seed)
    untrained = RewardModel.from_policy(tmp_path / "gpt2").eval()
    expected = accumulate_gradients(untrained, encode_rankings(config, tokenizer, rows), "fp32")
    [row] = read_metrics(tmp_path / "metrics")
    assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_how_many_passes_a_batch_of_rankings_takes_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = encode_rankings(REWARD, load_tokenizer(world.reward), rankings(12, seed=8))
    model = RewardModel.load(world.reward).eval()
    found = []
    for tokens in (2048, 60, 1):
        monkeypatch.setattr(reward_model, "PASS_TOKENS", tokens)
        model.zero_grad()
        loss = accumulate_gradients(model, ranked, "fp32")["loss"]
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        for mine, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_reward_model(world: World, tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # what was drawn before must not matter
        config = RewardModelConfig(seed=seed, prompts_per_batch=8, learning_rate=1e-3)
        with closing(Metrics(tmp_path / f"{name}-metrics")) as metrics:
            rows, zero = rankings(16, seed=6), demonstrations(4, 7)
            train_reward_model(config, world.sft, rows, zero, tmp_path / name, metrics)
        states.append(RewardModel.load(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_the_papers_numbers_of_sft_and_reward_model_are_the_defaults() -> None:
    sft, reward = SftConfig(), RewardModelConfig()
    assert (sft.epochs, sft.batch, sft.learning_rate) == (16, 32, 9.65e-6)
    assert (sft.final_rate_share, sft.dropout, sft.pretraining_share) == (0.1, 0.2, 0.1)
    assert (sft.max_prompt_tokens, sft.max_response_tokens) == (1024, 1024)
    assert (reward.epochs, reward.prompts_per_batch, reward.learning_rate) == (1, 64, 9e-6)
    assert (reward.final_rate_share, reward.max_prompt_tokens) == (0.1, 1024)


def test_rewards_keep_their_mean_and_advantages_do_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def whiten(values_BR: Tensor, mask_BR: Tensor, shift_mean: bool = True) -> Tensor:
        found_BR = kernels.whiten(values_BR, mask_BR, shift_mean)
        means = [x_BR[mask_BR].mean().item() for x_BR in (values_BR, found_BR)]
        kept.append(means[0] == pytest.approx(means[1], abs=1e-5))
        assert found_BR[mask_BR].var(correction=0).item() == pytest.approx(1, abs=1e-3)
        return found_BR

    monkeypatch.setattr(experience, "whiten", whiten)
    run(world, tmp_path / "policy")
    assert kept == [True, False]
