"""What torchrun starts in test_crew.py: jobs of all ranks, and what rank 0 does between them."""

import json
import os
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from instructloop.crew import Together, lead
from tests.training.letters import demonstrations, documents, prompts
from training import ranks
from training.config import PpoConfig, SftConfig
from training.metrics import Metrics
from training.model import load_tokenizer
from training.ppo import train_ppo
from training.reward_head import RewardModel
from training.rollout import Sampler
from training.sft import train_sft

SFT = SftConfig(epochs=1, batch=8, learning_rate=1e-3, dropout=0.0, checkpoint_every=2)
PPO = PpoConfig(
    episodes=16,
    batch=8,
    minibatch=8,
    policy_rate=1e-3,
    warmup_iterations=0,
    ptx_examples_per_episode=1,
    ptx_row_tokens=16,
    max_response_tokens=8,
)


def teach(base: Path, folder: Path) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    with closing(Metrics(folder.with_name("sft-metrics"))) as metrics:
        train_sft(SFT, base, demonstrations(24, 5), demonstrations(5, 6), folder, metrics)
    return metrics.rows


def reinforce(sft: Path, reward: Path, folder: Path) -> list[dict[str, float]]:
    metrics, sampler = Metrics(folder.with_name("ppo-metrics")), Sampler(sft, max_tokens=64)
    with closing(metrics), closing(sampler):
        texts = documents(60, seed=20)
        train_ppo(PPO, sft, reward, prompts(16), texts, sampler, folder, metrics)
    return metrics.rows


def alone(folder: Path) -> dict[str, object]:
    """What rank 0 sees of the others between jobs: nothing, and an engine starts."""
    seen = {"group": dist.is_initialized(), "told": "WORLD_SIZE" in os.environ}
    with closing(Sampler(folder, max_tokens=64)) as sampler:
        [[sample]] = sampler.sample([[5, 6, 7]], 4, seed=1)
    return {**seen, "ranks": ranks.size(), "drew": 0 < len(sample.token_ids) <= 4}


def main() -> None:
    base, folder = map(Path, sys.argv[1:])

    def program(together: Together) -> None:
        told = {"sft": together(teach, base, folder / "sft"), "alone": alone(folder / "sft")}
        RewardModel.from_policy(base).save(folder / "reward", load_tokenizer(base))
        told["ppo"] = together(reinforce, folder / "sft", folder / "reward", folder / "ppo")
        told["again"] = alone(folder / "ppo")
        with (folder / "told.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")

    lead(program)


if __name__ == "__main__":
    main()
