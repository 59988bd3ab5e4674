"""A side that another process drives: a line in asks for a run, a line out says what it took."""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Wall and process seconds between `start` and `stop`."""

    wall = cpu = 0.0

    def start(self) -> None:
        gc.collect()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def without(self, other: "Clock") -> "Clock":
        """What is left of this time after another that lies within it."""
        rest = Clock()
        rest.wall, rest.cpu = self.wall - other.wall, self.cpu - other.cpu
        return rest


# From the settings of a run to its clock and the figures that both sides must agree on.
Side = Callable[..., tuple[Clock, dict[str, float]]]


def serve(side: Side) -> None:
    """Answer requests, one a line, until the input ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        settings: dict[str, Any] = json.loads(line)
        clock, figures = side(**settings)
        print(
            json.dumps({"wall": clock.wall, "cpu": clock.cpu, **figures}), file=answers, flush=True
        )
