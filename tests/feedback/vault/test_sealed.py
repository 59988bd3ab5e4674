import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import CorruptEvent, InvalidEvent, InvalidInput
from contracts.events import READABLE, TEXT_BODIES, TOPIC_OF, topic_of, without_text
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.log import open_log
from feedback.log.spool import SpoolSettings
from feedback.vault import open_events
from feedback.vault.keys import KeyVault
from feedback.vault.master import LocalMasterKeys
from feedback.vault.sealed import SealedLog
from tests.fakes import MemorySink
from tests.feedback.log_backends import Embedded, Kafka
from tests.feedback.samples import STAMPER, completion, consent, demonstration, ranking

MARKER = "the heron wades at dusk"
# Whatever holds a text, in the order of `said`.
TOPICS = ("completions", "rankings", "demonstrations", "ratings", "edits", "comments")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SealedLog]:
    log = open_events(f"sqlite:///{tmp_path}/log.db")
    yield log
    log.close()


def said(user: str) -> list[pb.Event]:
    """One event of each kind that holds a text, with the marker in every place for one."""
    asked = completion(user, f"c-{user}", MARKER, (MARKER, MARKER), metadata={"why": MARKER})
    asked.completion.outputs[0].token_ids.extend([31337, 31338, 31339])
    order = ranking(user, f"c-{user}")
    order.ranking.metadata["why"] = MARKER
    shown = demonstration(user, MARKER, MARKER)
    shown.demonstration.metadata["why"] = MARKER
    about: dict[str, Any] = {
        "completion_id": f"c-{user}",
        "source": pb.SOURCE_API,
        "notice_version": "1",
        "metadata": {"why": MARKER},
    }
    judged = (
        pb.Rating(output=1, score=6, **about),
        pb.Edit(output=1, text=MARKER, **about),
        pb.Comment(text=MARKER, **about),
    )
    return [asked, order, shown, *(STAMPER.event(user, body) for body in judged)]


def read(log: SealedLog) -> list[pb.Event]:
    return [record.event for topic in TOPICS for record in follow(log, topic, {})]


def bytes_below(folder: Path) -> bytes:
    return b"\0".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def test_what_is_read_is_what_was_written(log: SealedLog) -> None:
    events = [consent("ann"), *said("ann")]
    log.append(events)
    assert read(log) == events[1:]
    assert [r.event for r in follow(log, "consents", {})] == events[:1]


def test_no_text_reaches_the_log_under_it(log: SealedLog, tmp_path: Path) -> None:
    log.append([consent("ann"), *said("ann")])
    assert MARKER.encode() not in bytes_below(tmp_path)
    for topic in TOPICS:
        (record,) = log.inner.read(topic, 0, 0, 9)
        assert record.event.sealed.key_id and MARKER not in str(record.event)
    stored = log.inner.read("completions", 0, 0, 9)[0].event.completion
    assert not any(output.token_ids for output in stored.outputs)


def test_what_rules_and_consumers_need_stays_readable(log: SealedLog) -> None:
    events = said("ann")
    log.append(events)
    stored = log.inner.read("completions", 0, 0, 9)[0].event
    assert (stored.id, stored.user_id, stored.time) == (
        events[0].id,
        events[0].user_id,
        events[0].time,
    )
    body = stored.completion
    assert (body.completion_id, body.release_id, body.source) == ("c-ann", "r0001-test", 2)
    assert [o.finish_reason for o in body.outputs] == ["stop", "stop"]
    assert log.inner.read("rankings", 0, 0, 9)[0].event.ranking.groups


def test_whatever_is_not_known_to_be_no_text_is_taken_out() -> None:
    assert {TOPIC_OF[body] for body in TEXT_BODIES} == set(TOPICS)
    for event in said("ann"):
        assert MARKER in str(event) and MARKER not in str(without_text(event))
    assert not {"text", "prompt", "response", "metadata", "token_ids"} & READABLE


def test_who_erased_is_skipped_counted_and_not_in_the_files(log: SealedLog, tmp_path: Path) -> None:
    log.append([consent("ann"), consent("bob"), *said("ann"), *said("bob")])
    log.erase("ann")
    assert {e.user_id for e in read(log)} == {"bob"}
    assert log.unreadable == dict.fromkeys(TOPICS, 1)
    assert log.ends("completions")[0] == 2
    erased = [e.event for e in log.inner.read("completions", 0, 0, 9) if e.event.user_id == "ann"]
    assert [bool(e.sealed.text) for e in erased] == [False]


def test_texts_from_before_there_were_keys_are_read_and_erased_from_the_files(
    tmp_path: Path,
) -> None:
    plain = open_log(f"sqlite:///{tmp_path}/log.db")
    plain.append([consent("ann"), *said("ann"), *said("bob")])
    plain.close()
    log = open_events(f"sqlite:///{tmp_path}/log.db")
    assert {e.user_id for e in read(log)} == {"ann", "bob"}
    log.erase("bob")
    assert {e.user_id for e in read(log)} == {"ann"}
    log.erase("ann")
    assert read(log) == []
    # While the log is open: nothing waits for a clean end.
    assert MARKER.encode() not in bytes_below(tmp_path)
    log.close()


def test_a_log_that_cannot_take_bytes_back_hides_old_plain_texts_all_the_same(
    tmp_path: Path,
) -> None:
    inner = open_log(f"sqlite:///{tmp_path}/log.db")
    inner.append(said("ann"))

    class OnlyAppends:
        """As Kafka: what is in it stays."""

        append, read, close = inner.append, inner.read, inner.close
        partitions, ends = inner.partitions, inner.ends

    vault = KeyVault(tmp_path / "v.db", LocalMasterKeys([b"k" * 32]))
    log = SealedLog(OnlyAppends(), vault)  # type: ignore[arg-type]
    log.erase("ann")
    assert read(log) == []
    log.close()


def test_what_comes_after_an_erasure_is_unreadable_until_the_person_agrees_again(
    log: SealedLog,
) -> None:
    log.append([consent("ann"), completion("ann", "c1", "old")])
    log.erase("ann")
    log.append([completion("ann", "c2", "was under way")])
    assert read(log) == []
    log.append([consent("ann"), completion("ann", "c3", "new")])
    assert [e.completion.completion_id for e in read(log)] == ["c3"]


def test_a_range_ends_where_it_ends_though_its_last_records_are_erased(log: SealedLog) -> None:
    for user in ("ann", "bob", "bob", "ann"):
        log.append([completion(user, f"c{log.ends('completions')[0]}")])
    log.erase("bob")
    upto = [r.offset for r in follow(log, "completions", {}, {0: 3})]
    assert (upto, [r.offset for r in follow(log, "completions", {})]) == ([0], [0, 3])


def test_an_event_moved_to_another_person_does_not_open(log: SealedLog) -> None:
    log.append(said("ann"))
    (record,) = log.inner.read("completions", 0, 0, 9)
    forged = pb.Event()
    forged.CopyFrom(record.event)
    forged.id, forged.user_id = "0193a000-0000-7000-8000-000000000000", "eve"
    log.inner.append([forged])
    with pytest.raises(CorruptEvent, match="0193a000"):
        log.read("completions", 0, 1, 9)


def test_a_vault_of_another_log_is_an_error_and_no_erasure(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    log = open_events(url)
    log.append(said("ann"))
    log.close()
    other = open_events(url, tmp_path / "other.db")
    with pytest.raises(InvalidInput, match="lacks keys"):
        read(other)
    other.close()


def test_an_invalid_event_is_refused_before_a_key_is_made(log: SealedLog) -> None:
    wrong = completion("ann", "c1")
    wrong.completion.ClearField("outputs")
    with pytest.raises(InvalidEvent, match="outputs"):
        log.append([wrong])
    assert log.vault.keys_named(["x"]) == {} and read(log) == []


def test_only_texts_may_be_sealed() -> None:
    event = consent("ann")
    event.sealed.key_id = "k"
    with pytest.raises(InvalidEvent, match="sealed"):
        MemorySink().append([event])
    assert topic_of(event) == "consents"


def test_people_are_erased_while_others_write(log: SealedLog, tmp_path: Path) -> None:
    users = [f"user-{i}" for i in range(40)]
    for user in users:
        log.append([consent(user), completion(user, f"c-{user}", f"{MARKER} of {user}")])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            log.append([completion("writer", f"w{log.ends('completions')[0]}")])

    writer = threading.Thread(target=write)
    writer.start()
    for user in users:
        log.erase(user)
    stop.set()
    writer.join()
    assert {e.user_id for e in read(log)} == {"writer"}
    assert MARKER.encode() not in bytes_below(tmp_path)


def test_a_dead_letter_comes_back_sealed_or_is_sealed_at_once(
    log: SealedLog, tmp_path: Path
) -> None:
    backend = Embedded(tmp_path / "log.db")
    newer, mended = completion("ann", "c1", MARKER), completion("ann", "c2", MARKER)
    log.append([newer])
    (record,) = log.inner.read("completions", 0, 0, 9)
    again = pb.Event()
    again.CopyFrom(record.event)
    again.schema_version = 99  # a producer of a later version
    again.id = mended.id
    backend.plant("completions", "ann", again.SerializeToString())
    backend.plant("completions", "ann", b"\xff")
    assert read(log) == [newer]
    (sealed, broken) = log.dead_letters()
    assert MARKER.encode() not in sealed.value
    assert log.revive(sealed) == "schema_version: expected 1"
    assert log.revive(replace(broken, value=mended.SerializeToString())) is None
    assert read(log) == [newer, mended]
    assert MARKER.encode() not in bytes_below(tmp_path)
    # What is in a letter is erased with the rest.
    log.erase("ann")
    (letter,) = log.dead_letters()
    assert not pb.Event.FromString(letter.value).sealed.text
    assert read(log) == []


def test_a_letter_in_which_nobody_can_be_made_out_does_not_stop_an_erasure(
    log: SealedLog, tmp_path: Path
) -> None:
    log.append([consent("ann"), *said("ann")])
    Embedded(tmp_path / "log.db").plant("completions", "ann", b"\xff ann")
    assert len(read(log)) == len(TOPICS)
    log.erase("ann")
    assert read(log) == []
    assert [letter.value for letter in log.dead_letters()] == [b"\xff ann"]


@pytest.mark.kafka
def test_texts_are_sealed_in_kafka_and_in_what_waits_for_it(
    kafka: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "30")
    backend = Kafka(kafka.bootstrap, f"sealed-{uuid.uuid4().hex[:8]}")
    spool = SpoolSettings(path=tmp_path / "spool.db")
    marker = f"{MARKER} {uuid.uuid4().hex}"
    events = [completion("ann", "c1", marker), completion("bob", "c2", marker)]
    with closing(open_events(backend.url, tmp_path / "v.db", spool)) as log:
        log.append([consent("ann"), consent("bob"), *events])
        waited = bytes_below(tmp_path)
        assert events[0].id.encode() in waited and marker.encode() not in waited
        assert sorted(map(str, read(log))) == sorted(map(str, events))
        ends = log.ends("completions")
        log.erase("ann")
        assert read(log) == events[1:]
        assert log.unreadable == {"completions": 1}
        positions: dict[int, int] = {}
        list(follow(log, "completions", positions))
        assert positions == {p: end for p, end in ends.items() if end}
    # Another process: the bytes are still there, and no key is.
    with closing(open_events(backend.url, tmp_path / "v.db")) as again:
        assert read(again) == events[1:]
        stored = [record.event for record in follow(again.inner, "completions", {})]
        assert sorted(e.id for e in stored) == sorted(e.id for e in events)
        assert all(e.sealed.text and marker not in str(e) for e in stored)
        # A letter that was sealed stays it; no reader takes what is sealed for one.
        assert again.dead_letters() == []
        backend.plant("completions", "bob", b"\xff")
        assert len(read(again)) == 1
        (letter,) = again.dead_letters()
        mended = completion("bob", "c3", marker)
        assert again.revive(replace(letter, value=mended.SerializeToString())) is None
        assert again.dead_letters() == []
        assert [e.completion.completion_id for e in read(again)] == ["c2", "c3"]
        stored = [record.event for record in follow(again.inner, "completions", {})]
        assert len(stored) == 3 and marker not in str(stored)
