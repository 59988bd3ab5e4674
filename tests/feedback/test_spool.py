"""The spool and its forwarder, over a sender that does as it is told."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contracts.errors import InvalidEvent, InvalidInput
from contracts.v1 import events_pb2 as pb
from feedback.log.forwarder import Forwarder
from feedback.log.spool import Spool, SpoolFull
from tests.feedback.samples import completion, consent, number

ROOT = Path(__file__).parents[2]
Done = Callable[[Exception | None], None]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db", 8 << 20)
    yield spool
    spool.close()


def held(spool: Spool) -> list[pb.Event]:
    return [pb.Event.FromString(row.event) for row in spool.waiting(0, 100_000)]


def test_what_was_appended_waits_until_it_is_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 8 << 20)
    events = [consent("ann"), completion("bob", "cmpl-1"), consent("cid")]
    spool.append(events)
    rows = spool.waiting(0, 10)
    assert [(r.topic, r.user) for r in rows] == [
        ("consents", "ann"),
        ("completions", "bob"),
        ("consents", "cid"),
    ]
    assert held(spool) == events
    assert spool.waiting(rows[0].seq, 1) == [rows[1]]
    spool.forget([rows[1]])
    spool.close()
    again = Spool(tmp_path / "spool.db", 8 << 20)
    assert held(again) == [events[0], events[2]]
    assert (again.depth("consents"), again.depth("completions")) == (2, 0)
    assert (again.oldest(), again.last()) == (rows[0].seq, rows[2].seq)
    again.close()


def test_every_commit_is_on_disk(spool: Spool) -> None:
    assert spool._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert spool._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # 2 is FULL


def test_an_invalid_event_keeps_its_batch_out_and_nobody_elses(spool: Spool) -> None:
    with pytest.raises(InvalidEvent, match="user_id"):
        spool.append([consent("ann"), pb.Event(id=number(1), schema_version=1, producer="test")])
    assert held(spool) == []


def test_callers_at_once_share_flushes(spool: Spool) -> None:
    flushes = 0

    def count(statement: str) -> None:
        nonlocal flushes
        flushes += statement == "COMMIT"

    spool._writer.set_trace_callback(count)
    threads = [threading.Thread(target=spool.append, args=([consent(f"u{i}")],)) for i in range(64)]
    with spool._writing:  # as if a flush were under way while they come
        for thread in threads:
            thread.start()
        while len(spool._asked) < 64:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert len(held(spool)) == 64
    assert flushes == 1


def test_numbers_say_what_waits(tmp_path: Path) -> None:
    now = 100.0
    spool = Spool(tmp_path / "spool.db", 1 << 20, clock=lambda: now)
    assert (spool.status().depth, spool.status().age_s) == (0, 0.0)
    spool.append([completion("ann", "cmpl-1", prompt="x" * 100_000)])
    now = 130.0
    spool.append([consent("ann")])
    status = spool.status()
    assert (status.depth, status.age_s) == (2, 30.0)
    assert 100_000 < status.bytes < 200_000
    assert status.share == status.bytes / (1 << 20)
    spool.forget(spool.waiting(0, 1))
    assert (spool.status().depth, spool.status().age_s) == (1, 0.0)
    spool.close()


def test_at_its_limit_it_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1 << 20)
    kept = 0
    assert spool.has_room()
    while spool.has_room():
        spool.append([completion("ann", f"cmpl-{kept}", prompt="x" * 20_000)])
        kept += 1
    with pytest.raises(SpoolFull, match="holds its limit of 1048576 bytes"):
        spool.append([completion("ann", "cmpl", prompt="x" * 100_000)])
    assert len(held(spool)) == kept > 40
    spool.forget(spool.waiting(0, 20))
    assert spool.has_room()
    spool.append([completion("ann", "cmpl", prompt="x" * 20_000)])
    spool.close()


def test_a_full_disk_is_a_full_spool(spool: Spool) -> None:
    spool._writer.execute("PRAGMA max_page_count = 20")  # SQLite says the same of a full disk
    with pytest.raises(SpoolFull, match="full"):
        spool.append([completion("ann", "cmpl-1", prompt="x" * 500_000)])
    spool.append([consent("ann")])
    assert len(held(spool)) == 1


def test_another_process_may_not_use_it(spool: Spool) -> None:
    with pytest.raises(InvalidInput, match="spool: expected a file that no other server uses"):
        Spool(spool.path, 1 << 20)


_WRITER = """
import sys
from pathlib import Path
from feedback.log.spool import Spool
from tests.feedback.samples import consent
spool = Spool(Path(sys.argv[1]), 1 << 30)
while True:
    event = consent("ann")
    spool.append([event])
    print(event.id, flush=True)
"""


def test_kill_9_loses_no_acknowledged_row(tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for round_ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / "spool.db")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(40 + round_):
            acknowledged.add(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        acknowledged |= set(writer.communicate(timeout=60)[0].split("\n")[:-1])
    spool = Spool(tmp_path / "spool.db", 1 << 30)
    assert acknowledged <= {event.id for event in held(spool)}
    assert len(acknowledged) >= 40 + 41 + 42
    spool.close()


class Wire:
    """What all senders of a test have to do with: how the log behaves now, and what it has."""

    def __init__(self) -> None:
        self.log: list[bytes] = []
        self.opened = self.closed = 0
        self.mood = "well"  # or: away, silent, failing

    def open(self) -> "WireSender":
        if self.mood == "away":
            raise OSError("a secret question")
        self.opened += 1
        return WireSender(self)


class WireSender:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def send(self, topic: str, key: bytes, value: bytes, done: Done) -> None:
        if self.wire.mood == "failing":
            done(OSError("a secret question"))
        elif self.wire.mood == "well":
            self.wire.log.append(value)
            done(None)

    def close(self) -> None:
        self.wire.closed += 1


def until(holds: Callable[[], bool], bound_s: float = 20.0) -> None:
    deadline = time.monotonic() + bound_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def forwarder(spool: Spool, wire: Wire) -> Iterator[Forwarder]:
    forwarder = Forwarder(spool, wire.open, stall_s=1.0, pause_s=0.01)
    forwarder.start()
    yield forwarder
    wire.mood = "away"
    forwarder.stop(0)


def test_everything_is_sent_once_and_in_order(
    spool: Spool, wire: Wire, forwarder: Forwarder
) -> None:
    events = [consent(f"user-{i}") for i in range(6000)]
    for start in range(0, 6000, 1000):
        spool.append(events[start : start + 1000])
    until(lambda: spool.status().depth == 0)
    assert [pb.Event.FromString(value) for value in wire.log] == events
    until(lambda: forwarder.forwarded == 6000)
    assert (forwarder.trouble, wire.opened) == (None, 1)


@pytest.mark.parametrize(
    ("mood", "trouble"), [("away", "OSError"), ("silent", "Stalled"), ("failing", "OSError")]
)
def test_rows_stay_until_the_log_is_well_again(
    spool: Spool,
    wire: Wire,
    forwarder: Forwarder,
    mood: str,
    trouble: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spool.append([consent("ann")])
    until(lambda: len(wire.log) == 1 and not spool.status().depth)
    wire.mood = mood
    if mood == "away":  # the connection that there was breaks
        wire.mood = "failing"
        spool.append([consent("ann")])
        until(lambda: forwarder.trouble is not None)
        wire.mood = "away"
    events = [consent(f"user-{i}") for i in range(50)]
    spool.append(events)
    until(lambda: forwarder.trouble == trouble)
    assert len(wire.log) == 1
    wire.mood = "well"
    until(lambda: not spool.status().depth)
    assert [pb.Event.FromString(value) for value in wire.log[-50:]] == events
    until(lambda: forwarder.trouble is None and "forwarded again" in caplog.text)
    assert "events wait in the spool" in caplog.text
    assert "secret" not in caplog.text


def test_stopping_sends_what_waits_and_leaves_what_cannot_be_sent(spool: Spool, wire: Wire) -> None:
    forwarder = Forwarder(spool, wire.open)
    spool.append([consent("ann")])
    forwarder.start()
    forwarder.stop()
    assert len(wire.log) == 1 and wire.closed == 1
    wire.mood = "silent"
    spool.append([consent("ann")])
    forwarder = Forwarder(spool, wire.open)
    forwarder.start()
    began = time.monotonic()
    forwarder.stop(0.1)
    assert time.monotonic() - began < 5
    assert spool.status().depth == 1


def test_trouble_is_said_once(
    spool: Spool, wire: Wire, forwarder: Forwarder, caplog: pytest.LogCaptureFixture
) -> None:
    wire.mood = "failing"
    with caplog.at_level(logging.INFO):
        spool.append([consent("ann")])
        until(lambda: wire.opened > 5)
    assert caplog.text.count("events wait in the spool") == 1
