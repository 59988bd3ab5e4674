"""Training on a GPU: tokens a second and peak memory of a step of SFT, reward model and PPO-ptx.

Part of the suite `gpu`. Generation is not in it; of PPO it is what follows it: scores, advantages,
one update of policy and value network.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import workloads
from benchmarks.ppo import networks
from benchmarks.result import Figure, figure
from benchmarks.reward_model import reward_model
from training.config import PpoConfig
from training.device import Device, Precision, moved
from training.experience import evaluate_rollout
from training.likelihood import accumulate_likelihood
from training.optimizer import adam, step
from training.ppo import update
from training.reward_model import Ranked, accumulate_gradients
from training.rollout import Sampled, pack

SHAPE: str = "large"
WARM_UP, RUNS = 2, 5
RATE, MAX_NORM = 1e-5, 1.0


@dataclass(frozen=True)
class Size:
    """Texts of SFT; prompts and answers of a batch of rankings; episodes, and tokens of the row of
    pretraining text with each.
    """

    texts: int = 64
    prompts: int = 32
    k: int = 9
    episodes: int = 64
    text_tokens: int = 128


@dataclass(frozen=True)
class Step:
    """One step of a stage; `tokens` are those of its data, each counted once."""

    name: str
    tokens: int
    run: Callable[[], None]


def measure() -> list[Figure]:
    figures = []
    for made in steps("cuda", SHAPE, "bf16", Size()):
        for _ in range(WARM_UP):
            made.run()
        torch.cuda.reset_peak_memory_stats()
        speeds = [made.tokens / _seconds(made.run) for _ in range(RUNS)]
        peak = torch.cuda.max_memory_allocated() / 2**30
        figures += [
            figure(f"{made.name}_tokens", speeds, "tokens/s, bf16"),
            figure(f"{made.name}_gib", [peak], "GiB, models and all"),
        ]
    return figures


def _seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def steps(device: Device, shape: str, precision: Precision, size: Size) -> Iterator[Step]:
    """One after another, so that the models of one are gone when the next is made."""
    yield _sft(device, shape, precision, size)
    yield _reward_model(device, shape, precision, size)
    yield _ppo(device, shape, precision, size)


def _sft(device: Device, shape: str, precision: Precision, size: Size) -> Step:
    model = moved(workloads.causal(shape, seed=0), device)
    optimizer = adam(model.parameters(), RATE)
    texts = workloads.documents(size.texts)

    def run() -> None:
        accumulate_likelihood(model, [(text[:1], text[1:]) for text in texts], precision)
        step(model, optimizer, MAX_NORM)

    return Step("sft", sum(map(len, texts)), run)


def _reward_model(device: Device, shape: str, precision: Precision, size: Size) -> Step:
    model = moved(reward_model(shape, seed=0), device)
    optimizer = adam(model.parameters(), RATE)
    ranked = [
        Ranked("user", "rater", prompt, answers, tuple(range(size.k)))
        for prompt, answers in workloads.rankings(size.k, size.prompts)
    ]

    def run() -> None:
        accumulate_gradients(model, ranked, precision)
        step(model, optimizer, MAX_NORM)

    return Step("reward_model", sum(len(r.tree) for r in ranked), run)


def _ppo(device: Device, shape: str, precision: Precision, size: Size) -> Step:
    config = PpoConfig(precision=precision)
    nets = networks(shape, device)
    optimizers = {n: adam(m.parameters(), RATE, config.adam_eps) for n, m in nets.trained.items()}
    data = workloads.episodes(size.episodes)
    sampled = [Sampled(tuple(r), (0.0,) * len(r), finished=True) for _, r in data]
    rollout = pack([prompt for prompt, _ in data], sampled, device=device)
    text_PT = torch.tensor(workloads.rows(size.episodes, size.text_tokens))

    def run() -> None:
        experience = evaluate_rollout(config, nets, rollout, config.beta)
        update(config, nets, experience, list(range(size.episodes)), text_PT)
        for name, optimizer in optimizers.items():
            step(nets.trained[name], optimizer, MAX_NORM)

    tokens = sum(len(prompt) + len(response) for prompt, response in data) + text_PT.numel()
    return Step("ppo", tokens, run)
