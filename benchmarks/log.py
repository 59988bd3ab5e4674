"""The log: the spool's rate, our forwarder and consumer over the bare client, what recording adds.

QUICK=1 takes a tenth of the events.
"""

import asyncio
import datetime as dt
import gc
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import quantiles

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from benchmarks.result import Figure, figure
from contracts.events import Stamper
from contracts.log import EventSource, Log, follow
from contracts.release import Canary, Release
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.log.address import KafkaAddress, KafkaSettings
from feedback.log.forwarder import Forwarder
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool
from feedback.log.spooled import SpooledLog
from feedback.vault import open_vault
from feedback.vault.sealed import SealedLog
from serving.recorder import Permit, Recorder, Transcript

RUNS = 3
# Readings of a whole log; each is short, and one that had to wait must not count for much.
READS = 7
EVENTS = 3000 if os.environ.get("QUICK") == "1" else 30_000
CALLERS = 256
# Completions a second while the time that recording adds is measured.
LOAD = 100
LIMIT = 4 << 30
TEXT = "All happy families are alike; every unhappy family is unhappy in its own way. " * 11
SETTINGS = KafkaSettings(timeout_s=10)

_RELEASE = Release(
    id="r1",
    model="stand-in",
    created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    artifact="digest",
    canary=Canary(token_ids=(1, 2), logprobs=(-1.0,)),
    code_version="benchmark",
)
_PERMIT = Permit(
    user_id="ann",
    notice_version="1",
    source=pb.SOURCE_API,
    prompt=pb.Prompt(text=TEXT[:300]),
    sampling=pb.Sampling(temperature=1, top_p=1, max_tokens=200),
    metadata={},
    at=1_767_225_600.0,
)


def measure() -> list[Figure]:
    """Every ratio in one run, both sides in turns."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        cluster = Cluster(folder / "kafka").start()
        stack.callback(cluster.stop)
        spool = [_spool_rate(folder / f"spool-{run}.db") for run in range(RUNS)]
        pairs = [_forward(cluster, folder, run) for run in range(RUNS)]
        reads = [_consume(cluster, folder, run) for run in range(READS)]
        added = [_added_ms(cluster, folder, run) for run in range(RUNS)]
    return [
        figure("spool_events_per_s", spool, "events/s", ">= 18000"),
        figure("forwarder_ratio", [ours / bare for ours, bare in pairs], "ratio", ">= 0.95"),
        figure("forwarder_events_per_s", [ours for ours, _ in pairs], "events/s"),
        *_consumer_figures(reads, "sealed", "", ">= 0.6"),
        *_consumer_figures(reads, "plain", "_plain", ""),
        figure("added_completion_ms_p99", [max(pair) for pair in added], "ms", "<= 5"),
        figure("added_completion_ms_p99_up", [up for up, _ in added], "ms"),
        figure("added_completion_ms_p99_away", [away for _, away in added], "ms"),
        figure("events", [EVENTS], "events"),
        figure("load_average_before", [load], "processes"),
    ]


def _consumer_figures(
    reads: Sequence[Mapping[str, tuple[float, float]]], kind: str, suffix: str, goal: str
) -> list[Figure]:
    ratios = [ours / bare for ours, bare in (run[kind] for run in reads)]
    return [
        figure(f"consumer_ratio{suffix}", ratios, "ratio", goal),
        figure(f"consumer_events_per_s{suffix}", [run[kind][0] for run in reads], "events/s"),
    ]


def _events(count: int) -> list[pb.Event]:
    stamp, body = Stamper("benchmark"), _transcript().event_body(_PERMIT, _RELEASE)
    return [stamp.event(f"user-{i % 997}", body) for i in range(count)]


def _transcript() -> Transcript:
    answer = Transcript("completions")
    choice = {"index": 0, "text": TEXT[:600], "token_ids": [], "finish_reason": "stop"}
    answer.add({"id": "cmpl-1", "choices": [choice]})
    return answer


def _spool_rate(path: Path) -> float:
    """Callers that each wait until theirs is durable, at once, on one writer."""
    with closing(Spool(path, LIMIT)) as spool:
        recorder = Recorder(spool, Stamper("benchmark"), wait_s=60)
        recorder.start()

        async def call() -> None:
            for _ in range(max(1, EVENTS // CALLERS)):
                await recorder.record(_PERMIT, _transcript(), _RELEASE)

        async def all_at_once() -> None:
            await asyncio.gather(*(call() for _ in range(CALLERS)))

        seconds = _timed(lambda: asyncio.run(all_at_once()))
        recorder.stop()
        return spool.status().depth / seconds


def _forward(cluster: Cluster, folder: Path, run: int) -> tuple[float, float]:
    """Events a second: the forwarder until its spool is empty; the client with all in memory."""
    address = _address(cluster, f"forward-{run}")
    log = KafkaLog(address, SETTINGS)
    log.ends("completions")
    events = _events(EVENTS)
    with closing(log), closing(Spool(folder / f"forward-{run}.db", LIMIT)) as spool:
        for start in range(0, EVENTS, 500):
            spool.append(events[start : start + 500])
        forwarder = Forwarder(spool, log.sender)

        def forward() -> None:
            forwarder.start()
            while spool.oldest() is not None:
                time.sleep(0.002)

        def bare() -> None:
            producer = KafkaProducer(
                bootstrap_servers=cluster.bootstrap, linger_ms=2, batch_size=128 << 10
            )
            for event in events:
                value = event.SerializeToString()
                producer.send(address.topic("completions"), key=event.user_id.encode(), value=value)
            producer.flush()
            producer.close()

        sides = (forward, bare) if run % 2 else (bare, forward)
        seconds = {side: _timed(side) for side in sides}
        forwarder.stop()
    return EVENTS / seconds[forward], EVENTS / seconds[bare]


def _consume(cluster: Cluster, folder: Path, run: int) -> dict[str, tuple[float, float]]:
    """Records a second, of a log whose texts are sealed, as a server's are, and of one in clear: a
    new reader from the start, and the client's records as they come.
    """
    vault = open_vault("", folder / f"consume-{run}.vault.db")
    rates: dict[str, tuple[float, float]] = {}
    with closing(vault):
        for kind, opened in (
            ("plain", lambda log: log),
            ("sealed", lambda log: SealedLog(log, vault)),
        ):
            address = _address(cluster, f"{kind}-consume-{run}")
            writer = KafkaLog(address, KafkaSettings(timeout_s=60))
            opened(writer).append(_events(EVENTS))
            writer.close()
            rates[kind] = _read_from_the_start(cluster, address, opened, run)
    return rates


def _read_from_the_start(
    cluster: Cluster, address: KafkaAddress, opened: Callable[[Log], EventSource], run: int
) -> tuple[float, float]:
    def ours() -> None:
        with closing(KafkaLog(address, SETTINGS)) as log:
            assert sum(1 for _ in follow(opened(log), "completions", {})) == EVENTS

    def bare() -> None:
        consumer = KafkaConsumer(
            bootstrap_servers=cluster.bootstrap, auto_offset_reset="earliest", max_poll_records=1000
        )
        topic = address.topic("completions")
        consumer.assign([TopicPartition(topic, p) for p in range(address.partitions)])
        seen = 0
        while seen < EVENTS:
            seen += sum(map(len, consumer.poll(timeout_ms=1000).values()))
        consumer.close()

    sides = (ours, bare) if run % 2 else (bare, ours)
    # What this process holds besides, PyTorch above all, is no part of either side.
    gc.collect()
    gc.freeze()
    seconds = {side: _timed(side) for side in sides}
    gc.unfreeze()
    return EVENTS / seconds[ours], EVENTS / seconds[bare]


def _added_ms(cluster: Cluster, folder: Path, run: int) -> tuple[float, float]:
    """The 99th percentile of what recording adds, with the broker up and away."""
    address = _address(cluster, f"added-{run}")
    log = KafkaLog(address, KafkaSettings(timeout_s=2))
    log.ends("completions")
    (node,) = cluster.nodes
    with closing(SpooledLog(log, Spool(folder / f"added-{run}.db", LIMIT))) as spooled:
        up = _p99_ms(spooled)
        cluster.kill(node)
        away = _p99_ms(spooled)
        cluster.restart(node)
        deadline = time.monotonic() + 60
        while spooled.spool.oldest() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
    return up, away


def _p99_ms(log: SpooledLog) -> float:
    recorder = Recorder(log, Stamper("benchmark"), wait_s=60)
    recorder.start()
    added: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        await recorder.record(_PERMIT, _transcript(), _RELEASE)
        added.append(1000 * (time.perf_counter() - began))

    async def steadily() -> None:
        asked = []
        for _ in range(max(200, EVENTS // 50)):
            asked.append(asyncio.create_task(one()))
            await asyncio.sleep(1 / LOAD)
        await asyncio.gather(*asked)

    asyncio.run(steadily())
    recorder.stop()
    return quantiles(added, n=100)[98]


def _address(cluster: Cluster, namespace: str) -> KafkaAddress:
    return KafkaAddress((cluster.bootstrap,), namespace, replication=1)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
