"""Advantages by a value network (GAE) and by the other responses to a prompt (RLOO, GRPO): reward
and gold at equal KL, and what an episode takes.

The generated world of the ablations and its runs, three seeds below runs/advantages; no pretraining
mix. QUICK=1 takes one seed and a few steps.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.ablations import BATCH, RANKINGS, SEEDS, Runs, windows
from benchmarks.result import Figure, figure
from benchmarks.worlds import QUICK, generated
from contracts.errors import InvalidInput
from instructloop.stages import Stages
from instructloop.version import code_version
from training.model import hide_progress_bars

FOLDER = Path("runs/advantages")
ITERATIONS = 4 if QUICK else 24
# The same 64 episodes: of as many prompts, or of 16 with 4 responses each.
SIDES: dict[str, dict[str, str | int]] = {
    "gae": {"advantage": "gae"},
    "rloo": {"advantage": "rloo", "samples_per_prompt": 4},
    "grpo": {"advantage": "grpo", "samples_per_prompt": 4},
}
# Nats per response at which sides are compared; every run gets there.
KL = 1e-4 if QUICK else 0.5
UNITS = {
    "reward": f"reward points at {KL:g} nats",
    "gold": f"gold points at {KL:g} nats",
    "episodes": f"episodes to {KL:g} nats",
    "kl_end": "nats per response at the end",
    "reward_end": "reward points at the end",
    "cpu": "CPU s an episode",
    "learning": "CPU s an episode without sampling",
}


def measure() -> list[Figure]:
    """All seeds, a core each."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        runs = list(pool.map(figures_of, SEEDS))
    return [
        figure(f"{name}@advantage={side}", [run[side][name] for run in runs], unit)
        for name, unit in UNITS.items()
        for side in SIDES
    ]


def figures_of(seed: int) -> dict[str, dict[str, float]]:
    """Every figure of one seed, by side."""
    torch.set_num_threads(1)
    hide_progress_bars()
    folder = FOLDER / str(seed)
    identity = {"code": code_version(), "quick": QUICK}
    stages = Stages(folder, identity, lambda line: print(f"{folder.name}: {line}", flush=True))
    runs = Runs(generated(seed), stages, seed)
    with closing(runs.sampler()) as sampler:
        runs.reward_models(*runs.rankings(sampler), ways=RANKINGS[:1])
        found = {}
        for side, settings in SIDES.items():
            run = runs.ppo(sampler, ITERATIONS, ptx_coefficient=0.0, **settings)
            learning, episodes = run["cpu"] - run["sampling"], BATCH * ITERATIONS
            found[side] = {
                **at_kl(run["steps"]),
                "cpu": run["cpu"] / episodes,
                "learning": learning / episodes,
            }
    return found


def at_kl(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reward, gold and episodes where a line through the windows of a run first comes to KL, and
    its last window. Raises InvalidInput where it never does.
    """
    points = windows(steps)
    width = BATCH * len(steps) / len(points)
    for i, (before, after) in enumerate(pairwise(points)):
        if after["kl"] >= KL:
            share = max(0.0, (KL - before["kl"]) / (after["kl"] - before["kl"]))
            between = {k: before[k] + share * (after[k] - before[k]) for k in ("reward", "gold")}
            ends = {"kl_end": points[-1]["kl"], "reward_end": points[-1]["reward"]}
            # Its middle stands for a window.
            return {**between, **ends, "episodes": (i + 0.5 + share) * width}
    raise InvalidInput("KL", f"a run that gets to {KL:g} nats", points[-1]["kl"])
