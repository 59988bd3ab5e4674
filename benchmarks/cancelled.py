"""Requests of two people, each with a canary of their own, that are cancelled at a random moment:
answers that cross, slots that leak. A part of the suite `swap`, on its engine.
"""

import asyncio
import time
from pathlib import Path

import httpx

from benchmarks.result import Figure, figure
from tests.serving.cancelled import canaries, cancel_many

CLIENTS = 24
FREED_BOUND_S = 30.0


def cancelled(url: str, folder: Path, requests: int) -> list[Figure]:
    """`folder`: the model that is served."""
    found = asyncio.run(cancel_many(url, canaries(folder), requests, CLIENTS))
    return [
        figure("cancelled", [found["cut"]], "requests", ">= 10000"),
        figure("cancelled_whole", [found["whole"]], "requests"),
        figure("cancelled_failed", [found["failed"]], "requests", "0"),
        figure("cancelled_crossed", [found["crossed"]], "answers", "0"),
        figure("cancelled_leaked", [_held(url)], "slots", "0"),
    ]


def _held(url: str) -> float:
    """Requests that the engine still works on, or keeps waiting, though every client is gone."""
    deadline = time.monotonic() + FREED_BOUND_S
    while (held := _requests(url)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def _requests(url: str) -> float:
    text = httpx.get(f"{url}/metrics", headers={"authorization": "Bearer il-root"}).text
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = [line for line in text.splitlines() if line.startswith(names)]
    if len(lines) < len(names):
        raise ValueError("the engine does not say how many requests it has")
    return sum(float(line.split()[-1]) for line in lines)
