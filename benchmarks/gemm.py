"""The share of this machine's matrix-product rate that an update reaches, without TRL beside it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import ppo, reward_model, sft, workloads
from benchmarks.baseline import Run
from benchmarks.result import Figure, figure
from benchmarks.workloads import SHAPES
from training.device import Precision, fastest_precision

RUNS = 3
SIDE = 2048
TRIES = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Update:
    """What is run, and how many tokens it pushes through the layers of a model: forward and
    backward, and forward alone.
    """

    name: str
    shape: str
    run: Callable[[], Run]
    trained: int
    evaluated: int = 0


def measure() -> list[Figure]:
    """Of process CPU on one thread; in bf16, too, where the processor multiplies it."""
    torch.set_num_threads(1)
    figures = []
    for precision in dict.fromkeys(("fp32", fastest_precision("cpu"))):
        for update in updates(precision):
            update.run()
            runs = [update.run() for _ in range(RUNS)]
            figures.append(gemm_share(update, runs, precision))
    return figures


def updates(precision: Precision) -> Iterator[Update]:
    tokens = sum(map(len, workloads.documents(sft.TEXTS)))
    yield Update("sft", sft.SHAPE, partial(sft.ours, precision), tokens)
    for k, prompts in reward_model.PROMPTS.items():
        data = workloads.rankings(k, prompts)
        tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in data)
        run = partial(reward_model.ours, k, precision)
        yield Update(f"k{k}", reward_model.SHAPE, run, tokens)
    tokens = sum(len(p) + len(r) for p, r in workloads.episodes(ppo.EPISODES))
    for name, mix in (("ppo", False), ("ppo_ptx", True)):
        # Policy and value network learn; they, the reference and the reward model are asked before.
        trained = 2 * tokens + mix * ppo.EPISODES * ppo.TEXT_TOKENS
        yield Update(name, ppo.SHAPE, partial(ppo.ours, precision, mix), trained, 4 * tokens)


def peak(precision: Precision) -> float:
    """FLOP per CPU second of a square product on this thread: the best of some."""
    ours, theirs = torch.randn(2, SIDE, SIDE).to(DTYPES[precision])
    seconds = []
    for _ in range(TRIES):
        began = time.process_time()
        ours @ theirs
        seconds.append(time.process_time() - began)
    return 2 * SIDE**3 / min(seconds)


def gemm_share(update: Update, runs: Sequence[Run], precision: Precision) -> Figure:
    """6 N and 2 N products a token of N weights (Kaplan et al. 2020, 2.1), over what the time of a
    run would have been enough for.

    Embeddings, heads and attention's own products are not counted.
    """
    s = SHAPES[update.shape]
    weights = s.layers * (4 * s.hidden**2 + 3 * s.hidden * s.inner)
    products = weights * (6 * update.trained + 2 * update.evaluated)
    rate = peak(precision)
    shares = [products / run["cpu"] / rate for run in runs]
    name = f"{update.name}_{precision}_gemm_share"
    return figure(name, shares, f"of {rate / 1e9:.0f} GFLOP/s")
