"""A spool before a real Kafka that dies, freezes and comes back; nobody waits for it."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contracts.errors import LogUnavailable
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.consent import ConsentLedger, ConsentState, Standing
from feedback.log import open_log
from feedback.log.address import KafkaSettings, parse
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool, SpoolFull, SpoolSettings
from feedback.log.spooled import SpooledLog, with_spool
from feedback.outage import ConsentWhileRoom, LastKnownConsent
from tests.fakes import FixedConsent
from tests.feedback.samples import completion, consent

# A batch in flight is given up after twice this, as the client counts.
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def cluster(kafka_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that these tests may kill."""
    cluster = Cluster(tmp_path_factory.mktemp("kafka-to-kill"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def url(cluster: Cluster) -> str:
    return f"kafka://{cluster.bootstrap}/spooled-{uuid.uuid4().hex[:8]}?replication=1&partitions=2"


@pytest.fixture
def log(url: str, tmp_path: Path) -> Iterator[SpooledLog]:
    kafka = KafkaLog(parse(url), KafkaSettings(timeout_s=TIMEOUT_S))
    log = SpooledLog(kafka, Spool(tmp_path / "spool.db", 64 << 20))
    log.forwarder._stall_s = 3.0
    yield log
    log.close()


def until(holds: Callable[[], bool], bound_s: float = 90.0) -> None:
    deadline = time.monotonic() + bound_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ids_in(url: str) -> list[str]:
    """What a new reader finds."""
    log = KafkaLog(parse(url), KafkaSettings(timeout_s=30))
    found = [record.event.id for record in follow(log, "completions", {})]
    log.close()
    return found


def test_a_log_of_this_machine_needs_no_spool(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/log.db")
    assert with_spool(log, SpoolSettings(path=tmp_path / "spool.db")) is log
    assert not (tmp_path / "spool.db").exists()
    log.close()


@pytest.mark.kafka
def test_who_appends_reads_it_at_once(log: SpooledLog) -> None:
    until(lambda: _ready(log))
    for turn in range(20):
        log.append([consent("ann", version=f"v{turn}")])
        assert ConsentLedger(log).granted_notice("ann") == f"v{turn}"


def _ready(log: SpooledLog) -> bool:
    try:
        return sum(log.ends("consents").values()) == 0
    except LogUnavailable:
        return False


@pytest.mark.kafka
@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_an_outage_longer_than_the_clients_patience_loses_and_doubles_nothing(
    cluster: Cluster, log: SpooledLog, url: str, fault: str
) -> None:
    (node,) = cluster.nodes
    written: list[str] = []
    slowest = 0.0

    def say(count: int) -> None:
        nonlocal slowest
        for _ in range(count):
            event = completion("ann", f"cmpl-{len(written)}")
            began = time.perf_counter()
            log.append([event])
            slowest = max(slowest, time.perf_counter() - began)
            written.append(event.id)

    say(50)
    until(lambda: log.spool.status().depth == 0)
    (cluster.kill if fault == "killed" else cluster.freeze)(node)
    away_since = time.monotonic()
    while time.monotonic() - away_since < 4 * TIMEOUT_S:
        say(5)
        time.sleep(0.2)
    assert log.spool.status().depth >= 50
    until(lambda: log.forwarder.trouble is not None)
    with pytest.raises(LogUnavailable):
        log.ends("completions")
    (cluster.restart if fault == "killed" else cluster.thaw)(node)
    say(50)
    until(lambda: log.spool.status().depth == 0)
    assert ids_in(url) == written
    assert log.forwarder.trouble is None
    assert slowest < 2.0  # a stall would be of the client's timeouts


@pytest.mark.kafka
def test_consent_goes_by_what_was_known_and_said_while_the_log_is_away(
    cluster: Cluster, log: SpooledLog, url: str
) -> None:
    (node,) = cluster.nodes
    reader = LastKnownConsent(ConsentLedger(log), log.spool)
    log.append([consent(user, version="v1") for user in ("ann", "bob", "cid")])
    until(lambda: log.spool.status().depth == 0)
    until(lambda: reader.granted_notice("ann") == "v1")
    until(lambda: reader.granted_notice("bob") == "v1")
    cluster.kill(node)
    try:
        assert reader.granted_notice("ann") == "v1"
        assert reader.granted_notice("cid") is None  # nobody had asked
        log.append([consent("ann", granted=False)])
        assert reader.granted_notice("ann") is None  # a withdrawal counts at once
        log.append([consent("dan", version="v2")])
        assert reader.granted_notice("dan") == "v2"
        assert reader.granted_notice("bob") == "v1"
        began = time.monotonic()
        for _ in range(5):
            reader.granted_notice("bob")
        assert time.monotonic() - began < 5.0
    finally:
        cluster.restart(node)
    until(lambda: log.spool.status().depth == 0)
    until(lambda: reader.granted_notice("cid") == "v1")
    assert reader.granted_notice("ann") is None


def test_every_purpose_goes_by_the_last_word_that_waits(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1 << 20)
    away = LastKnownConsent(Away(), spool)
    with pytest.raises(LogUnavailable, match="away"):
        away.state("ann")
    assert away.granted_notice("ann") is None
    spool.append([consent("ann", version="v1"), consent("bob")])
    assert away.state("ann").purposes == ["training", "evaluation", "reading"]
    took = consent("ann", granted=False)
    took.consent.purposes.append(pb.PURPOSE_READING)
    spool.append([took])
    assert away.state("ann").purposes == ["training", "evaluation"]
    assert away.granted_notice("ann") == "v1"
    spool.append([consent("ann", granted=False)])
    assert away.state("ann").purposes == []
    spool.close()


class Away:
    """feedback.consent.ConsentStates over a log that does not answer."""

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        raise LogUnavailable(user_id)

    def state(self, user_id: str) -> ConsentState:
        raise LogUnavailable(user_id)


class Slow:
    """ConsentStates over a log in which everybody agreed, and which answers when it may."""

    def __init__(self) -> None:
        self.asked, self.may_answer = 0, threading.Event()

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        return self.state(user_id).granted

    def state(self, user_id: str) -> ConsentState:
        self.asked += 1
        self.may_answer.wait(5)
        return ConsentState.on_all(Standing("v1"))


def test_questions_that_nobody_waits_for_are_not_asked_once_the_log_is_back(tmp_path: Path) -> None:
    """They would come before everybody's, who would be told what was known last meanwhile."""
    spool, slow = Spool(tmp_path / "spool.db", 1 << 20), Slow()
    known = LastKnownConsent(slow, spool)
    for _ in range(3):
        assert known.granted_notice("ann") is None
    slow.may_answer.set()
    until(lambda: known.granted_notice("ann") == "v1")
    assert slow.asked == 2
    spool.close()


def test_a_withdrawal_counts_that_leaves_the_spool_while_the_log_is_asked(tmp_path: Path) -> None:
    spool, slow = Spool(tmp_path / "spool.db", 1 << 20), Slow()
    known = LastKnownConsent(slow, spool)
    slow.may_answer.set()
    assert known.granted_notice("ann") == "v1"
    slow.may_answer.clear()
    spool.append([consent("ann", granted=False)])
    forwarding = threading.Timer(0.1, lambda: spool.forget(spool.waiting(0, 9)))
    forwarding.start()
    assert known.granted_notice("ann") is None
    assert known.granted_notice("ann") is None  # and from now on
    forwarding.join()
    slow.may_answer.set()
    spool.close()


def test_a_full_spool_keeps_nothing_more_or_refuses(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 1 << 20)
    agreed = FixedConsent({"ann": "v1"})
    quiet = ConsentWhileRoom(agreed, spool, refuse=False)
    strict = ConsentWhileRoom(agreed, spool, refuse=True)
    assert quiet.granted_notice("ann") == strict.granted_notice("ann") == "v1"
    for waits in (quiet, LastKnownConsent(Away(), spool)):
        with pytest.raises(BlockingIOError):
            waits.granted_notice("ann", wait=False)
    while spool.has_room():
        spool.append([completion("ann", "cmpl", prompt="x" * 50_000)])
    assert quiet.granted_notice("ann") is None
    with pytest.raises(SpoolFull, match="try again"):
        strict.granted_notice("ann")
    assert strict.granted_notice("bob") is None  # nothing of his would be kept
    spool.close()
