"""Faults: a serving process and its broker are killed and frozen while events come in, and the
power fails while the spool is written to. Is an acknowledged event lost, or shown twice?

QUICK=1 takes ten minutes in place of an hour. SEED=n is another schedule; the default is 1.
"""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.power_loss import Disk
from benchmarks.result import Figure, figure
from contracts.events import Stamper
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.log.address import KafkaSettings, parse
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool
from feedback.log.spool import measure as measure_spool

LIMIT = 4 << 30
# An outage longer than the client's default patience with a batch, which is 120 s.
LONG_OUTAGE_S = 135.0


@dataclass
class Run:
    """What happened in one schedule of faults."""

    seed: int
    acknowledged: set[str] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    kills: int = 0
    resumed_after_s: list[float] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return len(self.acknowledged - set(self.found))

    @property
    def doubled(self) -> int:
        return len(self.found) - len(set(self.found))


def measure_faults(seconds: float, crashes: int, seed: int) -> list[Figure]:
    """The figures of one schedule of faults and of `crashes` power failures."""
    print(f"seed {seed}: {seconds:.0f} s of faults, {crashes} power failures")
    load = os.getloadavg()[0]
    run = killed(seconds, seed)
    gone, rows = lost_at_power_failures(crashes, seed)
    weak, _ = lost_at_power_failures(max(10, crashes // 10), seed, weak=True)
    if not weak:
        raise AssertionError("the power failures lost nothing with synchronous=NORMAL: no test")
    return [
        figure("lost", [run.lost], "events", "0"),
        figure("doubled", [run.doubled], "events", "0"),
        figure("events", [len(run.acknowledged)], "events", ">= 1000000"),
        figure("kills", [run.kills], "kills", ">= 200"),
        figure("resume_s_max", [max(run.resumed_after_s, default=0.0)], "s", "<= 30"),
        figure("power_loss_crashes", [crashes], "crashes", ">= 1000"),
        figure("power_loss_lost", [gone], "rows", "0"),
        figure("power_loss_rows", [rows], "rows"),
        figure("power_loss_lost_with_synchronous_normal", [weak], "rows", "> 0"),
        figure("seed", [seed], ""),
        figure("seconds", [seconds], "s"),
        figure("load_average_before", [load], "processes"),
    ]


def measure() -> list[Figure]:
    """An hour, or ten minutes of it."""
    quick, seed = os.environ.get("QUICK") == "1", int(os.environ.get("SEED", "1"))
    return measure_faults(600 if quick else 3600, 100 if quick else 1000, seed)


def killed(seconds: float, seed: int) -> Run:
    """Writers and broker are killed and frozen for so long; then everything is read."""
    rng, run = random.Random(seed), Run(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        cluster = Cluster(folder / "kafka").start()
        stack.callback(cluster.stop)
        url = f"kafka://{cluster.bootstrap}/faults?replication=1"
        writer = Writer(folder, url)
        stack.callback(writer.kill)
        end, long_outage = time.monotonic() + seconds, seconds > 3 * LONG_OUTAGE_S
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.5, 3.0))
            kind = rng.choice(("writer", "writer", "broker", "frozen writer", "frozen broker"))
            _strike(kind, cluster, writer, run, rng.uniform(1.0, 8.0))
            if long_outage:
                _strike("broker", cluster, writer, run, LONG_OUTAGE_S)
                long_outage = False
        writer.stop()
        run.acknowledged = writer.acknowledged()
        run.found = _read(url)
    return run


def _strike(kind: str, cluster: Cluster, writer: "Writer", run: Run, pause: float) -> None:
    (node,) = cluster.nodes
    if kind == "writer":
        writer.kill()
        run.kills += 1
        writer.start()
    elif kind == "frozen writer":
        writer.signal(signal.SIGSTOP)
        time.sleep(pause)
        writer.signal(signal.SIGCONT)
    elif kind == "frozen broker":
        cluster.freeze(node)
        time.sleep(pause)
        cluster.thaw(node)
    else:
        cluster.kill(node)
        run.kills += 1
        time.sleep(pause)
        cluster.restart(node)
        run.resumed_after_s.append(writer.seconds_until_it_forwards())


class Writer:
    """A process that appends through a spool as fast as it can, and says what was acknowledged."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.spool, self.said = folder / "spool.db", folder / "acknowledged"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Returns when its first events are acknowledged: a kill before that would show nothing."""
        self.said.touch()
        before = self.said.stat().st_size
        command = [sys.executable, "-m", "benchmarks.fault_writer"]
        self.process = subprocess.Popen([*command, self.url, str(self.spool), str(self.said)])
        while self.said.stat().st_size == before:
            if self.process.poll() is not None:
                raise RuntimeError(f"the writer ended by itself: {self.process.returncode}")
            time.sleep(0.02)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """Let it forward what waits, and end."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        self.process.wait(600)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def acknowledged(self) -> set[str]:
        return set(self.said.read_text(encoding="ascii").split("\n")[:-1])

    def seconds_until_it_forwards(self, bound_s: float = 120.0) -> float:
        """From now on, as seen in the spool."""
        began, first = time.monotonic(), self._gone()
        while time.monotonic() - began < bound_s and self._gone() == first:
            time.sleep(0.05)
        return time.monotonic() - began

    def _gone(self) -> int:
        """The number of the oldest row that waits."""
        with contextlib.suppress(sqlite3.Error):
            return measure_spool(self.spool, LIMIT).oldest
        return 0


def _read(url: str) -> list[str]:
    log = KafkaLog(parse(url), KafkaSettings(timeout_s=60))
    with contextlib.closing(log):
        return [record.event.id for record in follow(log, "consents", {})]


def lost_at_power_failures(crashes: int, seed: int, weak: bool = False) -> tuple[int, int]:
    """Acknowledged rows that were gone after the power came back, and how many there were."""
    rng, disk, stamp = random.Random(seed), Disk(), Stamper("faults")
    lost = rows = 0
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version="1")
    for _ in range(crashes):
        with tempfile.TemporaryDirectory() as name:
            before, after = Path(name, "before"), Path(name, "after")
            before.mkdir()
            spool = Spool(before / "spool.db", LIMIT, connect=disk.weak if weak else disk.connect)
            there: set[str] = set()
            for _ in range(rng.randint(1, 40)):
                events = [stamp.event("ann", granted) for _ in range(rng.randint(1, 5))]
                spool.append(events)
                there |= {event.id for event in events}
                if rng.random() < 0.2:
                    gone = spool.waiting(0, rng.randint(1, 10))
                    spool.forget(gone)
                    there -= {pb.Event.FromString(row.event).id for row in gone}
            disk.fail(before, after)
            spool.close()
            disk.unsynced.clear()
            found = Spool(after / "spool.db", LIMIT)
            waits = {pb.Event.FromString(row.event).id for row in found.waiting(0, 10_000)}
            found.close()
            lost += len(there - waits)
            rows += len(there)
    return lost, rows
