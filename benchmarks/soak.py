"""Mixed load for half an hour, with a swap each minute: nothing fails, nothing that the server says
it keeps is lost, and its memory is flat.

Answers whole and streamed, each compared with its release's own; several answers at once that are
ranked; streams that are given up after their first chunk. `instructloop serve` as an operator
starts it, on an embedded log. QUICK=1 takes three minutes.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import mean

import httpx

from benchmarks.asking import Asking, over_and_over
from benchmarks.result import Figure, figure
from benchmarks.servers import agree, change_to, memory_mib, started, wait_until_ready
from contracts.log import follow
from contracts.release import ReleaseRegistry
from feedback.vault import open_events
from serving.access import KeyStore
from tests import tiny_models
from tests.conftest import free_port

QUICK = os.environ.get("QUICK", "") not in ("", "0")
MINUTES = 3 if QUICK else 30
ASKING, RANKING, LEAVING = 6, 2, 2
WEIGHT_SETS = 4
K = 4
TIMEOUT_S = 120.0


class Ranking:
    """Asks for several answers, puts them in an order and sends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Ids of the answers whose order the server took.
        self.taken: list[str] = []
        self.failed = 0

    def rank(self, client: httpx.Client) -> None:
        messages = [{"role": "user", "content": "List three colours"}]
        body = {"model": "tiny", "messages": messages, "n": K, "max_tokens": 16}
        try:
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            order = {
                "completion_id": answer["id"],
                "groups": [[1], [0, 2], [3]],
                "instruction_version": "soak",
            }
            client.post("/v1/feedback/rankings", json=order).raise_for_status()
        except httpx.HTTPError:
            with self._lock:
                self.failed += 1
            return
        with self._lock:
            self.taken.append(answer["id"])


def leave(client: httpx.Client) -> None:
    """Ask for a stream and give it up after what comes first."""
    body = {"model": "tiny", "prompt": "Write one sentence", "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response:
        response.raise_for_status()
        next(response.iter_raw())


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as aside:
        root = Path(aside)
        folders = {
            f"r{i}": tiny_models.save(root / f"model{i}", i, tied=False) for i in range(WEIGHT_SETS)
        }
        registry = ReleaseRegistry(root / "registry")
        for release_id, folder in folders.items():
            registry.publish(tiny_models.release(registry, folder, release_id))
        asking, ranking = Asking(folders), Ranking()
        with _served(root) as (connect, pid):
            acts = [*asking.acts(ASKING), *[ranking.rank] * RANKING, *[leave] * LEAVING]
            with over_and_over(connect, acts), connect() as client:
                memory, swaps = _minutes(registry, client, pid)
        completions, rankings = _in_log(root)
    lost = len(asking.recorded - completions) + len(set(ranking.taken) - rankings)
    faults = {name: asking.found[name] for name in ("mixed", "stale_cache", "unstamped")}
    third = len(memory) // 3
    grown = mean(memory[-third:]) / mean(memory[third : 2 * third]) - 1
    return [
        figure("minutes", [MINUTES], "minutes", ">= 30"),
        figure("swaps", [swaps], "swaps", ">= 30"),
        figure("answers", [asking.found["answers"]], "answers"),
        figure("rankings", [len(ranking.taken)], "rankings"),
        figure("failed", [asking.found["failed"] + ranking.failed], "requests", "0"),
        *(figure(name, [count], "answers", "0") for name, count in faults.items()),
        figure("lost", [lost], "events", "0"),
        figure("memory_mib", memory, "MiB"),
        # From the middle third of the time to the last one.
        figure("memory_growth", [grown], "share", "<= 0.01"),
    ]


@contextmanager
def _served(root: Path) -> Iterator[tuple["_Connect", int]]:
    agree(_log(root), "ann")
    key, _ = KeyStore(root / "keys.db").create("ann")
    port, output = free_port(), root / "server.log"
    command = ["-m", "instructloop.cli", "serve", "--registry", str(root / "registry")]
    command += ["--port", str(port), "--keys", str(root / "keys.db"), "--log", _log(root)]
    url = f"http://127.0.0.1:{port}"
    with started(command, {}, output) as process:
        wait_until_ready(f"{url}/readyz", process, output)
        yield _Connect(url, key), process.pid


class _Connect:
    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, {"authorization": f"Bearer {key}"}

    def __call__(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, headers=self._headers, timeout=TIMEOUT_S)


def _minutes(registry: ReleaseRegistry, client: httpx.Client, pid: int) -> tuple[list[float], int]:
    """Swap each minute; memory at the end of each, in MiB, and the number of swaps."""
    memory, swaps, began = [], 0, time.monotonic()
    for minute in range(1, MINUTES + 1):
        release_id = f"r{minute % WEIGHT_SETS}"
        registry.swap_to(release_id)
        swaps += change_to(client, release_id)["outcome"] == "swapped_in"
        time.sleep(max(0.0, began + 60 * minute - time.monotonic()))
        memory.append(memory_mib(pid))
        print(f"minute {minute}: {memory[-1]:.1f} MiB, {swaps} swaps", flush=True)
    return memory, swaps


def _in_log(root: Path) -> tuple[set[str], set[str]]:
    """Ids of the answers that are in the log, and of those whose ranking is."""
    with closing(open_events(_log(root))) as log:
        completions = {r.event.completion.completion_id for r in follow(log, "completions", {})}
        rankings = {r.event.ranking.completion_id for r in follow(log, "rankings", {})}
    return completions, rankings


def _log(root: Path) -> str:
    return f"sqlite:///{root}/log.db"
