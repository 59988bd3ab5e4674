"""What the embedded log adds to what every log does."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.events import topic_of
from feedback.log.embedded import EmbeddedLog
from tests.feedback.samples import completion, consent, number


def test_every_commit_is_on_disk(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.sqlite")
    assert log._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert log._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # 2 is FULL
    log.close()


def test_an_append_is_all_or_nothing(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.sqlite")
    clash = consent("ann")
    log._writer.execute(
        "CREATE TRIGGER stop BEFORE INSERT ON events WHEN new.id = '"
        + clash.id
        + "' BEGIN SELECT raise(ABORT, 'stopped'); END"
    )
    with pytest.raises(sqlite3.IntegrityError, match="stopped"):
        log.append([consent("ann"), clash])
    assert log.ends("consents") == {0: 0}
    log.close()


def test_a_file_of_the_first_version_is_read_and_goes_on(tmp_path: Path) -> None:
    """Its table, as version 0.1 made it."""
    file = tmp_path / "log.sqlite"
    old = [completion("ann", "cmpl-1", n=1), consent("ann")]
    with sqlite3.connect(file) as db:
        db.execute(
            "CREATE TABLE events (topic TEXT NOT NULL, partition INTEGER NOT NULL,"
            " offset INTEGER NOT NULL, id TEXT NOT NULL, event BLOB NOT NULL,"
            " PRIMARY KEY (topic, partition, offset), UNIQUE (topic, id))"
        )
        rows = [(topic_of(e), 0, 0, e.id, e.SerializeToString()) for e in old]
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
    db.close()
    opened = time.time()
    EmbeddedLog(file).close()
    log = EmbeddedLog(file)
    log.append([old[0], completion("ann", "cmpl-2", n=2)])
    assert [r.event.id for r in log.read("completions", 0, 0, 9)] == [number(1), number(2)]
    assert log.expire("completions", before=opened - 1) == 0  # no older than their discovery
    assert log.expire("completions", before=time.time() + 1) == 2
    log.close()


def test_reviving_what_the_log_already_holds_adds_nothing(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path / "log.sqlite")
    event = consent("ann")
    log.append([event])
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        db.execute("INSERT INTO events VALUES ('consents', 0, 1, 'x', ?, 0, '')", (b"\xff",))
    db.close()
    assert len(log.read("consents", 0, 0, 9)) == 1
    (letter,) = log.dead_letters()
    assert log.revive(replace(letter, value=event.SerializeToString())) is None
    assert [r.event for r in log.read("consents", 0, 0, 9)] == [event]
    assert log.dead_letters() == []
    log.close()
