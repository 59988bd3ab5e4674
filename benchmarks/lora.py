"""A minibatch of PPO with adapters and with all weights: what is trained, held and spent."""

import multiprocessing
import resource
from functools import partial
from multiprocessing.connection import Connection

import torch

from benchmarks import workloads
from benchmarks.baseline import Run, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.reward_model import reward_model
from benchmarks.trl.worker import Clock
from training import lora
from training.config import LoraConfig, PpoConfig
from training.experience import evaluate_rollout
from training.networks import Networks
from training.optimizer import adam, average_weights, step
from training.ppo import update
from training.rollout import Sampled, pack

SHAPES = ("tiny", "base")
EPISODES = 8
RUNS = 3
SIDES = {"full": None, "lora": LoraConfig()}


def measure() -> list[Figure]:
    """Process CPU on one thread, float32, both sides in turn, each run in a process of its own
    whose peak is over what it began with.
    """
    torch.set_num_threads(1)
    networks("tiny", LoraConfig())  # what is loaded for it is not of a run
    figures = []
    for shape in SHAPES:
        sides = {name: partial(apart, shape, adapter) for name, adapter in SIDES.items()}
        runs = in_turn(sides, RUNS)
        for name, found in runs.items():
            own = f"{shape}_{name}"
            figures += [
                figure(f"{own}_trained", [r["trained"] for r in found], "weights"),
                figure(f"{own}_peak", [r["peak"] for r in found], "MB"),
                figure(f"{own}_update", [r["cpu"] for r in found], "CPU s"),
            ]
        faster, less = (
            ratios(runs["full"], runs["lora"]),
            ratios(runs["full"], runs["lora"], "peak"),
        )
        figures += [
            figure(f"{shape}_full_over_lora_update", faster, "x, CPU seconds"),
            figure(f"{shape}_full_over_lora_peak", less, "x, memory"),
        ]
    return figures


def apart(shape: str, adapter: LoraConfig | None) -> Run:
    """A run in a child, which ends with its memory."""
    forks = multiprocessing.get_context("fork")
    ours, its = forks.Pipe()
    child = forks.Process(target=_send, args=(its, shape, adapter))
    child.start()
    its.close()
    run: Run = ours.recv()
    child.join()
    return run


def _send(connection: Connection, shape: str, adapter: LoraConfig | None) -> None:
    connection.send(updated(shape, adapter))


def updated(shape: str, adapter: LoraConfig | None) -> Run:
    """The second of two minibatches, so that the first allocates; then the average."""
    before = _peak()
    config = PpoConfig(lora=adapter, ptx_coefficient=0.0)
    nets = networks(shape, adapter)
    average = lora.twin(nets.policy)
    trained = list(nets.trained.values())
    optimizers = [adam(m.parameters(), 1e-5, config.adam_eps) for m in trained]
    data = workloads.episodes(EPISODES)
    sampled = [Sampled(tuple(r), (0.0,) * len(r), finished=True) for _, r in data]
    rollout = pack([prompt for prompt, _ in data], sampled)
    experience = evaluate_rollout(config, nets, rollout, config.beta)
    clock = Clock()
    for _ in range(2):
        clock.start()
        update(config, nets, experience, [*range(EPISODES)], torch.zeros(0, 8, dtype=torch.long))
        for model, optimizer in zip(trained, optimizers, strict=True):
            step(model, optimizer, config.max_grad_norm)
        average_weights(average, nets.policy, config.ema)
        clock.stop()
    learned = [x.numel() for o in optimizers for g in o.param_groups for x in g["params"]]
    spent = {"wall": clock.wall, "cpu": clock.cpu}
    return {**spent, "trained": float(sum(learned)), "peak": _peak() - before}


def networks(shape: str, adapter: LoraConfig | None) -> Networks:
    """As PPO loads them; with an adapter reference and reward share frozen weights."""
    policy, value = workloads.causal(shape, seed=0).eval(), reward_model(shape, seed=1)
    if adapter is not None:
        lora.adapt(policy, adapter, seed=0)
        lora.adapt(value.backbone, adapter, seed=0)
    return Networks(policy, lora.frozen_twin(policy), value, lora.frozen_twin(value))


def _peak() -> float:
    """Of this process, in MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
