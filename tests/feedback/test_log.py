"""What every log must do, whatever is behind it; then what the embedded one adds."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contracts.errors import InvalidEvent, InvalidInput
from contracts.log import Log, end_offsets, follow
from contracts.v1 import events_pb2 as pb
from feedback.log import open_log
from tests.feedback.samples import completion, consent, number

# Opens the same log again, as another process would.
OpenLog = Callable[[], Log]
ROOT = Path(__file__).parents[2]


def embedded(folder: Path) -> OpenLog:
    return lambda: open_log(f"sqlite:///{folder}/log.sqlite")


@pytest.fixture(params=[embedded])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> OpenLog:
    opener: OpenLog = request.param(tmp_path)
    return opener


@pytest.fixture
def log(reopen: OpenLog) -> Iterator[Log]:
    log = reopen()
    yield log
    log.close()


def offsets(log: Log, topic: str) -> list[int]:
    return [record.offset for record in log.read(topic, 0, 0, 10_000)]


def test_a_new_log_is_empty(log: Log) -> None:
    assert log.partitions("completions") == 1
    assert log.end_offset("completions", 0) == 0
    assert log.read("completions", 0, 0, 10) == []


def test_events_come_back_as_written_in_order(log: Log) -> None:
    events = [completion("ann", f"cmpl-{i}") for i in range(3)]
    log.append(events)
    records = log.read("completions", 0, 0, 10)
    assert [r.event for r in records] == events
    assert [(r.topic, r.partition, r.offset) for r in records] == [
        ("completions", 0, 0),
        ("completions", 0, 1),
        ("completions", 0, 2),
    ]


def test_every_topic_counts_for_itself(log: Log) -> None:
    log.append([completion("ann", "cmpl-1"), consent("ann"), completion("ann", "cmpl-2")])
    assert end_offsets(log, ("completions", "consents", "rankings")) == {
        "completions": {0: 2},
        "consents": {0: 1},
        "rankings": {0: 0},
    }


def test_an_id_is_appended_once(log: Log) -> None:
    first, second = completion("ann", "cmpl-1", n=1), completion("ann", "cmpl-2", n=2)
    log.append([first])
    log.append([first, second, second])
    assert offsets(log, "completions") == [0, 1]
    assert [r.event.id for r in log.read("completions", 0, 0, 10)] == [number(1), number(2)]


def test_one_invalid_event_keeps_the_whole_batch_out(log: Log) -> None:
    with pytest.raises(InvalidEvent, match="user_id"):
        log.append([consent("ann"), pb.Event(id=number(1), schema_version=1, producer="test")])
    assert log.end_offset("consents", 0) == 0


def test_read_is_bounded_by_offset_and_limit(log: Log) -> None:
    log.append([consent(f"user-{i}") for i in range(5)])
    assert [r.offset for r in log.read("consents", 0, 1, 2)] == [1, 2]
    assert log.read("consents", 0, 5, 2) == []


def test_replay_gives_the_same_events_and_takes_nothing_away(log: Log, reopen: OpenLog) -> None:
    log.append([consent(f"user-{i}") for i in range(2500)])
    again = reopen()
    first = [r.event.id for r in follow(log, "consents", {})]
    assert [r.event.id for r in follow(again, "consents", {})] == first
    assert len(first) == 2500
    again.close()


def test_following_goes_on_where_it_stopped(log: Log) -> None:
    positions: dict[int, int] = {}
    log.append([consent("ann")])
    assert [r.event.user_id for r in follow(log, "consents", positions)] == ["ann"]
    log.append([consent("bob")])
    assert [r.event.user_id for r in follow(log, "consents", positions)] == ["bob"]
    assert positions == {0: 2}


def test_groups_commit_apart_and_durably(log: Log, reopen: OpenLog) -> None:
    assert log.committed("builder", "consents", 0) == 0
    log.commit("builder", "consents", 0, 3)
    log.commit("builder", "consents", 0, 7)
    again = reopen()
    assert again.committed("builder", "consents", 0) == 7
    assert again.committed("other", "consents", 0) == 0
    assert again.committed("builder", "rankings", 0) == 0
    again.close()


def test_unknown_topics_and_partitions_are_refused(log: Log) -> None:
    with pytest.raises(InvalidInput, match="topic"):
        log.read("letters", 0, 0, 1)
    with pytest.raises(InvalidInput, match="partition"):
        log.end_offset("consents", 1)


def test_threads_append_at_once_without_a_gap(log: Log) -> None:
    def write(writer: int) -> None:
        for i in range(25):
            log.append([consent(f"user-{writer}-{i}"), consent(f"user-{writer}-{i}-again")])

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert offsets(log, "consents") == list(range(200))


@pytest.mark.parametrize(
    "url", ["kafka://localhost:9092", "sqlite:///", "sqlite://x", "log.sqlite", "sqlite:///a?b=c"]
)
def test_only_a_plain_sqlite_url_is_opened(url: str) -> None:
    with pytest.raises(InvalidInput, match="log URL"):
        open_log(url)


def test_embedded_log_syncs_every_commit(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    writer = log._writer  # type: ignore[attr-defined]
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)  # 2 is FULL
    log.close()


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


def test_two_processes_append_at_once_from_the_first_open_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.sqlite"
    writers = [start_writer(url, name, 100) for name in ("left", "right")]
    acknowledged = {i for w in writers for i in w.communicate(timeout=60)[0].split()}
    assert [w.returncode for w in writers] == [0, 0]
    log = open_log(url)
    records = log.read("consents", 0, 0, 1000)
    assert [r.offset for r in records] == list(range(200))
    assert {r.event.id for r in records} == acknowledged
    log.close()


def test_kill_9_loses_no_acknowledged_event(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.sqlite"
    acknowledged: set[str] = set()
    for round_ in range(3):
        writer = start_writer(url, f"round-{round_}", 100_000)
        assert writer.stdout is not None
        for _ in range(40 + round_):
            acknowledged.add(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        acknowledged |= set(writer.communicate(timeout=60)[0].split("\n")[:-1])
    log = open_log(url)
    records = list(follow(log, "consents", {}))
    assert [r.offset for r in records] == list(range(len(records)))
    assert acknowledged <= {r.event.id for r in records}
    assert len(acknowledged) >= 40 + 41 + 42
    log.close()
