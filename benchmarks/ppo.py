"""A PPO update on ragged episodes, with and without the pretraining mix, over TRL's without it;
and the rollouts before it.
"""

from functools import partial

import torch

from benchmarks import rollout, workloads
from benchmarks.baseline import Baseline, Run, agree, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.reward_model import reward_model
from benchmarks.trl.worker import Clock
from training.config import PpoConfig
from training.device import Device, Precision, moved
from training.experience import evaluate_rollout
from training.networks import Networks
from training.optimizer import adam, step
from training.ppo import update
from training.rollout import Sampled, pack

TRL = "1.12.0"  # the last release with a PPOTrainer
SHAPE = "tiny"
EPISODES, MINIBATCHES = 64, 4
TEXT_TOKENS = 128
BETA = 0.05
RUNS = 3
MICRO_BATCHES = (8, 16, 64)
GOALS = {
    "ppo_fp32": ">= 2.3",
    "ppo_bf16": ">= 3.5",
    "ppo_ptx_fp32": ">= 1.3",
    "ppo_ptx_bf16": ">= 2",
}


def measure() -> list[Figure]:
    """Process CPU on one thread, all sides in turn. TRL runs in float32, as it ships, at the micro
    batch that suits it best; it is given what the episodes were sampled with, which ours computes.
    """
    torch.set_num_threads(1)
    baseline = Baseline("ppo", TRL)
    theirs = partial(
        baseline.run, shape=SHAPE, episodes=EPISODES, minibatches=MINIBATCHES, beta=BETA
    )
    try:
        seconds = {micro: theirs(micro=micro)["cpu"] for micro in MICRO_BATCHES}
        sides = {"trl": partial(theirs, micro=min(seconds, key=lambda m: seconds[m]))}
        for mix in ("", "_ptx"):
            sides[f"ppo{mix}_fp32"] = partial(ours, "fp32", bool(mix))
            sides[f"ppo{mix}_bf16"] = partial(ours, "bf16", bool(mix))
        runs = in_turn(sides, RUNS)
    finally:
        baseline.close()
    for name in ("kl", "score"):
        agree(f"mean {name}", runs["ppo_fp32"][0][name], runs["trl"][0][name], 1e-2)
    figures = []
    for name, goal in GOALS.items():
        figures += [
            figure(f"{name}_over_trl", ratios(runs["trl"], runs[name]), "x, CPU seconds", goal),
            figure(f"{name}_over_trl_wall", ratios(runs["trl"], runs[name], "wall"), "x, wall s"),
            figure(f"{name}_episodes", [EPISODES / r["cpu"] for r in runs[name]], "episodes/CPU s"),
        ]
    return [*figures, *rollout.measure()]


def ours(precision: Precision, mix: bool) -> Run:
    """One iteration of training.ppo without its sampling; with `mix` one row of pretraining
    text an episode.
    """
    config = PpoConfig(
        precision=precision, beta=BETA, whiten_rewards=False, ptx_coefficient=27.8 if mix else 0.0
    )
    nets = networks()
    trained = nets.trained.values()
    optimizers = [adam(m.parameters(), 1e-5, config.adam_eps) for m in trained]
    data = workloads.episodes(EPISODES)
    sampled = [Sampled(tuple(r), (0.0,) * len(r), finished=True) for _, r in data]
    rollout = pack([prompt for prompt, _ in data], sampled)
    text_PT = torch.tensor(workloads.rows(EPISODES, TEXT_TOKENS))
    size = EPISODES // MINIBATCHES
    clock = Clock()
    clock.start()
    experience = evaluate_rollout(config, nets, rollout, BETA)
    for i in range(MINIBATCHES):
        indices = list(range(i * size, (i + 1) * size))
        update(config, nets, experience, indices, text_PT[indices])
        for model, optimizer in zip(trained, optimizers, strict=True):
            step(model, optimizer, config.max_grad_norm)
    clock.stop()
    score = float(experience.scores_B.mean())
    return {"wall": clock.wall, "cpu": clock.cpu, "kl": experience.kl, "score": score}


def networks(shape: str = SHAPE, device: Device = "cpu") -> Networks:
    """The weights that the baseline has too."""
    return Networks(
        policy=moved(workloads.causal(shape, seed=0).eval(), device),
        reference=moved(workloads.causal(shape, seed=1).eval().requires_grad_(False), device),
        value=moved(reward_model(shape, seed=2), device),
        reward=moved(reward_model(shape, seed=3).requires_grad_(False), device),
    )
