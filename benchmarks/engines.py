"""Weights of an 86M model into two engines in processes of their own, and into one in this process.

In turn, from the call until the last engine has them.
"""

import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks import workloads
from benchmarks.result import Figure, figure
from benchmarks.trl.tokenizer import tokenizer
from training.engines import Engines
from training.model import save_policy
from training.rollout import Engine, Sampler

ENGINES, RUNS, LONGEST = 2, 5, 128


def measure() -> list[Figure]:
    policies = [workloads.causal("base", seed) for seed in (0, 1)]
    # The first run maps the memory, and does not count.
    pushed, loaded = [], []
    with tempfile.TemporaryDirectory() as scratch:
        save_policy(policies[0], tokenizer(), folder := Path(scratch) / "policy")
        make = partial(Sampler, folder, LONGEST)
        with closing(Engines(ENGINES, make)) as engines, closing(make()) as sampler:
            for run in range(RUNS + 1):
                state = policies[run % 2].state_dict()
                pushed.append(_seconds(engines, state))
                loaded.append(_seconds(sampler, state))
    return [
        figure("weights_to_engines_ms", [1000 * x for x in pushed[1:]], f"ms, {ENGINES} engines"),
        figure("weights_in_process_ms", [1000 * x for x in loaded[1:]], "ms"),
    ]


def _seconds(engine: Engine, state: Mapping[str, Tensor]) -> float:
    started = time.perf_counter()
    engine.load(state)
    return time.perf_counter() - started
