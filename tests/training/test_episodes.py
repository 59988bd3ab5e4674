"""Rollouts that are drawn while the one before is learned from."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests import tiny_models
from tests.training.letters import TorchSampler, World, documents, prompts
from tests.training.test_ppo import SMALL, configured
from training.config import PpoConfig
from training.episodes import Episodes, iteration_seed
from training.metrics import Metrics, read_metrics
from training.model import load_policy, response_logprobs
from training.ppo import train_ppo
from training.rollout import Rollout, Sampled, Sampler

OVERLAP: dict[str, Any] = {"overlap": True, "importance_cap": 2.0, "policy_rate": 5e-3}
IDS = [[5, 6], [7], [8, 9, 10], [11]]


class Engine:
    """Says which weights it was asked with, and waits for what the test says."""

    def __init__(self) -> None:
        self.weight, self.asked = 0.0, 0
        self.go = threading.Event()
        self.go.set()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.weight = state["w"].item()

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        assert self.go.wait(30), "nobody let it go"
        self.asked += 1
        drawn = Sampled((seed % 100,), (self.weight,), finished=True)
        return [[drawn] * samples for _ in prompts]


def episodes(engine: Engine, weights: dict[str, Tensor], **changes: Any) -> Episodes:
    config = configured(**{"batch": 4, "minibatch": 4, "episodes": 12, **OVERLAP, **changes})
    return Episodes(config, cast("Sampler", engine), lambda: weights, IDS)


def said(rollout: Rollout) -> tuple[int, float]:
    """Of which iteration a rollout is, and the weights that it was drawn on."""
    return rollout.pairs[0][1][0], rollout.engine_logprobs_BR[0, 0].item()


def test_the_next_rollout_is_of_the_weights_before_the_block_and_drawn_in_it() -> None:
    engine, weights = Engine(), {"w": torch.tensor(1.0)}
    drawn = episodes(engine, weights)
    assert said(drawn.take(0)) == (0, 1.0)
    for iteration in (1, 2):
        engine.go.clear()
        with drawn.ahead(iteration):
            before = weights["w"].item()
            weights["w"] += 1.0
            assert engine.asked == iteration
            engine.go.set()  # which an engine that is waited for would never see
        assert said(drawn.take(iteration)) == (iteration, before)
    with drawn.ahead(3):
        pass
    assert engine.asked == 3  # of the third and last iteration


def test_without_overlap_a_rollout_is_of_the_weights_of_its_iteration() -> None:
    engine, weights = Engine(), {"w": torch.tensor(1.0)}
    drawn = episodes(engine, weights, overlap=False)
    for iteration in range(3):
        assert said(drawn.take(iteration)) == (iteration, 1.0 + iteration)
        with drawn.ahead(iteration + 1):
            weights["w"] += 1.0
            assert engine.asked == iteration + 1


def test_what_was_drawn_ahead_is_part_of_the_state() -> None:
    engine, weights = Engine(), {"w": torch.tensor(1.0)}
    drawn = episodes(engine, weights, samples_per_prompt=2)
    drawn.take(0)
    with drawn.ahead(1):
        weights["w"] += 1.0
    state = drawn.state_dict()
    again = episodes(Engine(), {"w": torch.tensor(7.0)}, samples_per_prompt=2)
    again.load_state_dict(state)
    ours, its = again.take(1), drawn.take(1)
    assert ours.pairs == its.pairs and ours.samples == its.samples == 2
    assert said(ours) == said(its) == (1, 1.0)
    # The order of prompts goes on behind them.
    assert [p for p, _ in again.take(2).pairs] == [p for p, _ in drawn.take(2).pairs]


def test_a_block_that_fails_waits_for_the_engine() -> None:
    engine = Engine()
    drawn = episodes(engine, {"w": torch.tensor(1.0)})
    engine.go.clear()
    threading.Timer(0.2, engine.go.set).start()
    with pytest.raises(ZeroDivisionError), drawn.ahead(0):
        raise ZeroDivisionError
    assert engine.asked == 1


def test_an_engine_that_fails_ahead_is_heard() -> None:
    class Broken(Engine):
        def sample(self, *_: Any, **__: Any) -> list[list[Sampled]]:
            raise MemoryError("no room for the cache")

    with (
        pytest.raises(MemoryError, match="no room"),
        episodes(Broken(), {"w": torch.tensor(1.0)}).ahead(0),
    ):
        pass


def test_the_responses_to_a_prompt_stand_in_a_row() -> None:
    rollout = episodes(Engine(), {"w": torch.tensor(1.0)}, samples_per_prompt=2).take(0)
    asked = [prompt for prompt, _ in rollout.pairs]
    assert len(asked) == 4 and asked[0] == asked[1] != asked[2] == asked[3]


def learn(world: World, folder: Path, **changes: Any) -> list[dict[str, float]]:
    sampler: Any = TorchSampler(world.sft)
    texts, metrics_folder = documents(60, seed=20), folder.with_name(f"{folder.name}-metrics")
    with closing(Metrics(metrics_folder)) as metrics:
        config = configured(**{"episodes": 32 * 3, **OVERLAP, **changes})
        train_ppo(config, world.sft, world.reward, prompts(40), texts, sampler, folder, metrics)
    return read_metrics(metrics_folder)


def test_one_step_off_policy_the_same_seed_gives_the_same_policy(
    world: World, tmp_path: Path
) -> None:
    one, two = learn(world, tmp_path / "one"), learn(world, tmp_path / "two")
    assert one == two
    files = [tmp_path / name / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The first batch is the policy's own, the others are of the one before.
    assert one[0]["logprob_mismatch_max"] < 1e-4
    assert one[1]["logprob_mismatch_max"] > 1e-2
    assert one[0]["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_reward_rises_one_step_off_policy(world: World, tmp_path: Path) -> None:
    rows = learn(world, tmp_path / "policy", episodes=32 * 12, policy_rate=2e-3)
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.5


def test_a_run_that_stops_early_leaves_the_engine_idle(world: World, tmp_path: Path) -> None:
    before = threading.active_count()
    rows = learn(world, tmp_path / "policy", episodes=32 * 12, beta=0.0, kl_budget=0.3)
    assert len(rows) < 12 and threading.active_count() == before


@pytest.mark.vllm
def test_an_engine_beside_the_trainer_draws_from_its_own_copy_of_the_weights(
    tmp_path: Path,
) -> None:
    folder = tiny_models.save(tmp_path / "model", 0, tied=True)
    policy, old = load_policy(folder), load_policy(folder)
    config = PpoConfig(
        **{**SMALL.model_dump(), **OVERLAP, "batch": 4, "minibatch": 4, "max_response_tokens": 24}
    )
    with closing(Sampler(folder, max_tokens=64)) as sampler:
        ids = [[70, 71, 72, 73], [80], [90, 91, 92], [75, 76]]
        drawn = Episodes(config, sampler, policy.state_dict, ids)
        with drawn.ahead(0), torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.5)
        rollout = drawn.take(0)
        again = sampler.sample([p for p, _ in rollout.pairs], 24, iteration_seed(config, 0))
    for model, least, most in ((old, 0.0, 1e-4), (policy, 0.1, 1e3)):
        logprobs = torch.cat(response_logprobs(model, rollout.pairs))
        apart = (logprobs - rollout.engine_logprobs_BR[rollout.mask_BR]).abs().max().item()
        assert least <= apart < most
    # The trainer has other weights by now, the engine has not.
    assert [response for _, response in rollout.pairs] == [group[0].token_ids for group in again]
