"""The log of one machine: one SQLite file, shared by several processes and threads.

A commit is in the write-ahead log and on disk before `append` returns (WAL, synchronous=FULL).
One partition a topic.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from contracts.errors import InvalidInput
from contracts.events import TEXT_BODIES, TOPIC_OF, TOPICS, topic_of, validate, without_text
from contracts.log import Record
from contracts.v1 import events_pb2 as pb

# How long a writer waits for another process's transaction; one lasts milliseconds.
_BUSY_SECONDS = 30.0

# Events keep their rowid: a WITHOUT ROWID table moves every row above a quarter page to a page of
# its own, which makes a log of 1.3 KB events 3.5 times as large and half as fast.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    id TEXT NOT NULL,
    event BLOB NOT NULL,
    PRIMARY KEY (topic, partition, offset),
    UNIQUE (topic, id)
);
CREATE TABLE IF NOT EXISTS committed (
    consumers TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    PRIMARY KEY (consumers, topic, partition)
) WITHOUT ROWID;
"""
_END = "SELECT coalesce(max(offset) + 1, 0) FROM events WHERE topic = ? AND partition = ?"
_APPEND = "INSERT INTO events VALUES (?, 0, ?, ?, ?) ON CONFLICT (topic, id) DO NOTHING"
_READ = (
    "SELECT offset, event FROM events WHERE topic = ? AND partition = ? AND offset >= ?"
    " ORDER BY offset LIMIT ?"
)
_COMMIT = (
    "INSERT INTO committed VALUES (?, ?, ?, ?)"
    " ON CONFLICT (consumers, topic, partition) DO UPDATE SET offset = excluded.offset"
)
_MENTIONS = (
    "SELECT rowid, event FROM events WHERE topic = ? AND rowid > ?"
    " AND instr(event, CAST(? AS BLOB)) ORDER BY rowid LIMIT ?"
)
_COMMITTED = "SELECT offset FROM committed WHERE consumers = ? AND topic = ? AND partition = ?"


class EmbeddedLog:
    """contracts.log.Log in a file. One connection writes, one reads, so that no reader waits."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_opens(path.parent):
            self._writer = _connect(path)
            self._writer.executescript(_SCHEMA)
            self._reader = _connect(path)
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    def append(self, events: Sequence[pb.Event]) -> None:
        for event in events:
            validate(event)
        rows = [(topic_of(e), e.id, e.SerializeToString(deterministic=True)) for e in events]
        with self._transaction() as db:
            ends: dict[str, int] = {}
            for topic, event_id, blob in rows:
                if topic not in ends:
                    ends[topic] = db.execute(_END, (topic, 0)).fetchone()[0]
                ends[topic] += db.execute(_APPEND, (topic, ends[topic], event_id, blob)).rowcount

    def partitions(self, topic: str) -> int:
        _check(topic, 0)
        return 1

    def end_offset(self, topic: str, partition: int) -> int:
        _check(topic, partition)
        with self._read_lock:
            return int(self._reader.execute(_END, (topic, partition)).fetchone()[0])

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        _check(topic, partition)
        if offset < 0 or limit < 0:
            raise InvalidInput("offset, limit", "numbers >= 0", (offset, limit))
        with self._read_lock:
            rows = self._reader.execute(_READ, (topic, partition, offset, limit)).fetchall()
        return [Record(topic, partition, at, pb.Event.FromString(blob)) for at, blob in rows]

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        _check(topic, partition)
        if offset < 0:
            raise InvalidInput("offset", "a number >= 0", offset)
        with self._transaction() as db:
            db.execute(_COMMIT, (group, topic, partition, offset))

    def committed(self, group: str, topic: str, partition: int) -> int:
        _check(topic, partition)
        with self._read_lock:
            row = self._reader.execute(_COMMITTED, (group, topic, partition)).fetchone()
        return int(row[0]) if row else 0

    def erase(self, user_id: str) -> int:
        """contracts.log.Erasing: the bytes are zeroed in the database and gone from its WAL."""
        done = 0
        for topic in (TOPIC_OF[body] for body in TEXT_BODIES):
            after = 0
            while rows := self._mentions(topic, after, user_id):
                mine = [(at, e) for at, e in rows if e.user_id == user_id]
                with self._transaction() as db:
                    db.executemany("UPDATE events SET event = ? WHERE rowid = ?", _bare(mine))
                done += len(mine)
                after = rows[-1][0]
        with self._write_lock:
            busy, *_ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError("erased, but a reader holds the old bytes in the log: erase again")
        return done

    def _mentions(self, topic: str, after: int, user_id: str) -> list[tuple[int, pb.Event]]:
        with self._read_lock:
            rows = self._reader.execute(_MENTIONS, (topic, after, user_id, 500)).fetchall()
        return [(at, pb.Event.FromString(blob)) for at, blob in rows]

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; IMMEDIATE, since a read lock cannot always be raised to a write lock."""
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA secure_delete = ON")
    return db


def _bare(rows: Sequence[tuple[int, pb.Event]]) -> Iterator[tuple[bytes, int]]:
    for at, event in rows:
        bare = without_text(event)
        bare.sealed.SetInParent()  # says that there was a text
        yield bare.SerializeToString(deterministic=True), at


@contextmanager
def _only_one_opens(folder: Path) -> Iterator[None]:
    """The switch to WAL fails at once, without waiting, when two processes try it on a new file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check(topic: str, partition: int) -> None:
    if topic not in TOPICS:
        raise InvalidInput("topic", "one of " + ", ".join(TOPICS), topic)
    if partition != 0:
        raise InvalidInput("partition", "0, the only one", partition)
