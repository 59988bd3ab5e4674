"""What every log must do, whatever is behind it."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.errors import InvalidEvent, InvalidInput
from contracts.log import Log, Record, end_offsets, follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.consent import ConsentLedger, ConsentState, Standing, fold
from tests.feedback.log_backends import Backend, Embedded, Kafka
from tests.feedback.samples import completion, consent, number

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def backend(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Backend:
    if request.param == "embedded":
        return Embedded(tmp_path / "log.sqlite")
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "30")  # a busy machine is no outage
    cluster: Cluster = request.getfixturevalue("kafka")
    return Kafka(cluster.bootstrap, f"suite-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def log(backend: Backend) -> Iterator[Log]:
    log = backend.open()
    yield log
    log.close()


def everything(log: Log, topic: str) -> list[Record]:
    return list(follow(log, topic, {}))


def ids(records: list[Record]) -> list[str]:
    return [record.event.id for record in records]


def home(log: Log, topic: str, user: str) -> int:
    """The partition of a person who is in the topic."""
    return next(r.partition for r in follow(log, topic, {}) if r.event.user_id == user)


def test_a_new_log_is_empty(log: Log) -> None:
    partitions = range(log.partitions("completions"))
    assert log.ends("completions") == dict.fromkeys(partitions, 0)
    assert [log.read("completions", p, 0, 10) for p in partitions] == [[] for _ in partitions]


def test_events_come_back_as_written_in_order(log: Log) -> None:
    events = [completion("ann", f"cmpl-{i}") for i in range(3)]
    log.append(events)
    partition = home(log, "completions", "ann")
    records = log.read("completions", partition, 0, 10)
    assert [r.event for r in records] == events
    assert [(r.topic, r.partition, r.offset) for r in records] == [
        ("completions", partition, 0),
        ("completions", partition, 1),
        ("completions", partition, 2),
    ]


def test_one_person_stays_in_one_partition_and_in_order(log: Log) -> None:
    users = [f"user-{i}" for i in range(20)]
    log.append([completion(user, f"{user}-{turn}") for turn in range(3) for user in users])
    records = everything(log, "completions")
    for user in users:
        own = [r for r in records if r.event.user_id == user]
        assert [r.event.completion.completion_id for r in own] == [f"{user}-{t}" for t in range(3)]
        assert len({r.partition for r in own}) == 1
    assert {r.partition for r in records} == set(range(log.partitions("completions")))


def test_every_topic_counts_for_itself(log: Log) -> None:
    log.append([completion("ann", "cmpl-1"), consent("ann"), completion("ann", "cmpl-2")])
    ends = end_offsets(log, ("completions", "consents", "rankings"))
    assert {topic: sum(of.values()) for topic, of in ends.items()} == {
        "completions": 2,
        "consents": 1,
        "rankings": 0,
    }


def test_an_id_is_shown_once_at_its_first_offset(log: Log, backend: Backend) -> None:
    first, second = completion("ann", "cmpl-1", n=1), completion("ann", "cmpl-2", n=2)
    log.append([first])
    log.append([first, second, second])
    records = everything(log, "completions")
    assert ids(records) == [number(1), number(2)]
    partition = records[0].partition
    for offset in range(6):  # wherever a reader begins, and whatever it read before
        again = backend.open()
        expected = [r for r in records if r.offset >= offset]
        assert again.read("completions", partition, offset, 10) == expected
        assert log.read("completions", partition, offset, 10) == expected
        again.close()


def test_a_reader_that_waits_at_the_end_does_not_see_a_copy(log: Log) -> None:
    positions: dict[int, int] = {}
    event = consent("ann")
    log.append([event])
    assert len(list(follow(log, "consents", positions))) == 1
    log.append([event])
    assert list(follow(log, "consents", positions)) == []
    assert positions == {p: end for p, end in log.ends("consents").items() if end}


def test_one_invalid_event_keeps_the_whole_batch_out(log: Log) -> None:
    with pytest.raises(InvalidEvent, match="user_id"):
        log.append([consent("ann"), pb.Event(id=number(1), schema_version=1, producer="test")])
    assert sum(log.ends("consents").values()) == 0


def test_an_event_that_is_too_large_is_refused(log: Log) -> None:
    with pytest.raises(InvalidEvent, match="event: expected at most 8388608 bytes, got 9000"):
        log.append([completion("ann", "cmpl-1", prompt="x" * 9_000_000)])
    log.append([completion("ann", "cmpl-1", prompt="x" * 8_000_000)])
    assert len(everything(log, "completions")[0].event.completion.prompt.text) == 8_000_000


def test_read_is_bounded_by_offset_and_limit(log: Log) -> None:
    log.append([consent("ann") for _ in range(5)])
    partition = home(log, "consents", "ann")
    assert [r.offset for r in log.read("consents", partition, 1, 2)] == [1, 2]
    assert log.read("consents", partition, 5, 2) == []
    assert log.read("consents", partition, 500, 2) == []
    assert log.read("consents", partition, 0, 0) == []


def test_replay_gives_the_same_events_and_takes_nothing_away(log: Log, backend: Backend) -> None:
    log.append([consent(f"user-{i}") for i in range(2500)])
    again = backend.open()
    first = everything(log, "consents")
    assert everything(again, "consents") == first == everything(log, "consents")
    assert len(set(ids(first))) == 2500
    again.close()


def test_following_goes_on_where_it_stopped(log: Log) -> None:
    positions: dict[int, int] = {}
    log.append([consent("ann")])
    assert [r.event.user_id for r in follow(log, "consents", positions)] == ["ann"]
    log.append([consent("bob")])
    assert [r.event.user_id for r in follow(log, "consents", positions)] == ["bob"]
    assert positions == {p: end for p, end in log.ends("consents").items() if end}


def test_following_stops_where_it_is_told(log: Log) -> None:
    log.append([consent("ann") for _ in range(5)])
    ends = log.ends("consents")
    log.append([consent("ann")])
    assert len(list(follow(log, "consents", {}, ends))) == 5
    assert len(list(follow(log, "consents", {}, {home(log, "consents", "ann"): 2}))) == 2


def test_groups_commit_apart_and_durably(log: Log, backend: Backend) -> None:
    assert log.committed("builder", "consents", 0) == 0
    log.commit("builder", "consents", 0, 3)
    log.commit("builder", "consents", 0, 7)
    again = backend.open()
    assert again.committed("builder", "consents", 0) == 7
    assert again.committed("other", "consents", 0) == 0
    assert again.committed("builder", "rankings", 0) == 0
    again.close()


def test_unknown_topics_and_partitions_are_refused(log: Log) -> None:
    with pytest.raises(InvalidInput, match="topic: expected one of completions"):
        log.read("letters", 0, 0, 1)
    with pytest.raises(InvalidInput, match="partition"):
        log.read("consents", log.partitions("consents"), 0, 1)
    with pytest.raises(InvalidInput, match="offset: expected a number >= 0, got -1"):
        log.read("consents", 0, -1, 1)
    with pytest.raises(InvalidInput, match="offset: expected a number >= 0, got -1"):
        log.commit("builder", "consents", 0, -1)


def test_threads_append_and_read_at_once(log: Log) -> None:
    seen: list[list[Record]] = []

    def write(writer: int) -> None:
        for i in range(25):
            log.append([consent(f"user-{writer}-{i}"), consent(f"user-{writer}-{i}")])
        seen.append(everything(log, "consents"))

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert len(set(ids(everything(log, "consents")))) == 200
    for partition, end in log.ends("consents").items():
        assert [r.offset for r in log.read("consents", partition, 0, 999)] == list(range(end))


def test_what_is_older_is_dropped_and_offsets_go_on(log: Log, backend: Backend) -> None:
    log.append([consent("ann"), consent("ann")])
    assert log.expire("consents", before=time.time() - 3600) == 0
    time.sleep(0.05)
    between = time.time()
    time.sleep(0.05)
    log.append([consent("ann")])
    kept = everything(log, "consents")[2:]
    assert log.expire("consents", before=between) == 2
    again = backend.open()
    assert everything(again, "consents") == kept == everything(log, "consents")
    assert log.read("consents", kept[0].partition, 0, 10) == kept
    assert log.expire("consents", before=time.time() + 3600) == 1
    assert everything(log, "consents") == []
    log.append([consent("ann")])
    assert [r.offset for r in everything(again, "consents")] == [3]
    again.close()


def test_what_is_no_event_is_put_aside_with_the_reason(log: Log, backend: Backend) -> None:
    newer = consent("ann")
    newer.schema_version = 99
    log.append([consent("ann")])
    backend.plant("consents", "ann", b"\xffwhat ann said")
    backend.plant("consents", "ann", newer.SerializeToString())
    backend.plant("consents", "ann", completion("ann", "cmpl-1").SerializeToString())
    log.append([consent("ann")])
    again = backend.open()
    for reader in (again, log):
        states = [(r.offset, r.event.consent.state) for r in everything(reader, "consents")]
        withdrawn = [(n, pb.CONSENT_STATE_WITHDRAWN) for n in (1, 2, 3)]
        granted = pb.CONSENT_STATE_GRANTED
        assert states == [(0, granted), *withdrawn, (4, granted)]
    letters = sorted(log.dead_letters(), key=lambda letter: letter.offset)
    assert [(d.topic, d.offset, d.reason) for d in letters] == [
        ("consents", 1, "not an Event in protobuf's wire format"),
        ("consents", 2, "schema_version: expected 1"),
        ("consents", 3, "an event of the topic completions"),
    ]
    assert letters[0].value == b"\xffwhat ann said"
    assert log.revive(letters[0]) == "not an Event in protobuf's wire format"
    assert len(again.dead_letters()) == 3
    again.close()


def test_a_dead_letter_comes_back_once_when_it_can_be_read(log: Log, backend: Backend) -> None:
    event = consent("ann")
    positions: dict[int, int] = {}
    log.append([consent("ann")])
    backend.plant("consents", "ann", event.SerializeToString()[:-1])
    assert len(list(follow(log, "consents", positions))) == 2  # one counts as a withdrawal
    (letter,) = log.dead_letters()
    mended = replace(letter, value=event.SerializeToString())
    assert log.revive(mended) is None
    assert [r.event for r in follow(log, "consents", positions)] == [event]
    assert log.dead_letters() == []
    assert log.revive(mended) is None  # as one who was not sure that it succeeded
    assert list(follow(log, "consents", positions)) == []
    again = backend.open()
    assert ids(everything(again, "consents"))[1:] == [event.id]
    again.close()


def test_a_consent_that_cannot_be_read_is_a_withdrawal_until_it_can(
    log: Log, backend: Backend
) -> None:
    ledger, grant = ConsentLedger(log), consent("ann", at=5)
    log.append([consent("ann", at=1), consent("bob", at=1)])
    assert ledger.granted_notice("ann") == "1"
    backend.plant("consents", "ann", b"\xff")
    assert (ledger.granted_notice("ann"), ledger.granted_notice("bob")) == (None, "1")
    state = fold(everything(log, "consents"))["ann"]
    assert all(standing.took_back(1.0) for standing in (state.training, state.evaluation))
    (letter,) = log.dead_letters()
    assert log.revive(replace(letter, value=grant.SerializeToString())) is None
    assert ledger.granted_notice("ann") == "1"
    again = backend.open()
    state = fold(everything(again, "consents"))["ann"]
    assert state == ConsentState.on_all(Standing("1"))
    assert again.dead_letters() == []  # who meets the bytes again does not bury them again
    again.close()


def test_what_cannot_be_read_of_other_topics_says_nothing_of_consent(
    log: Log, backend: Backend
) -> None:
    log.append([consent("ann")])
    backend.plant("completions", "ann", b"\xff")
    assert list(everything(log, "completions")) == []
    assert ConsentLedger(log).granted_notice("ann") == "1"


# Appends one event at a time and says its id once the log has acknowledged it.
_WRITER = """
import sys
from feedback.log import open_log
from tests.feedback.samples import consent
log = open_log(sys.argv[1])
for i in range(int(sys.argv[3])):
    event = consent(f"{sys.argv[2]}-{i}")
    log.append([event])
    print(event.id, flush=True)
"""


def start_writer(url: str, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, url, name, str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_append_at_once_from_the_first_open_on(backend: Backend) -> None:
    writers = [start_writer(backend.url, name, 100) for name in ("left", "right")]
    acknowledged = {i for w in writers for i in w.communicate(timeout=60)[0].split()}
    assert [w.returncode for w in writers] == [0, 0]
    log = backend.open()
    found = ids(everything(log, "consents"))
    assert len(found) == 200 and set(found) == acknowledged
    log.close()


def test_kill_9_loses_no_acknowledged_event(backend: Backend) -> None:
    acknowledged: set[str] = set()
    for round_ in range(3):
        writer = start_writer(backend.url, f"round-{round_}", 100_000)
        assert writer.stdout is not None
        for _ in range(40 + round_):
            acknowledged.add(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        acknowledged |= set(writer.communicate(timeout=60)[0].split("\n")[:-1])
    log = backend.open()
    found = ids(everything(log, "consents"))
    assert len(set(found)) == len(found)
    assert acknowledged <= set(found)
    assert len(acknowledged) >= 40 + 41 + 42
    log.close()
