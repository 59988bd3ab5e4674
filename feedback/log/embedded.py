"""The log of one machine: one SQLite file, shared by several processes and threads.

A commit is in the write-ahead log and on disk before `append` returns (WAL, synchronous=FULL).
One partition a topic. An append is all or nothing, and no id is ever stored twice.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from contracts.database import only_one_opens, opening, transaction
from contracts.errors import InvalidInput
from contracts.events import TEXT_BODIES, TOPIC_OF, topic_of, without_text
from contracts.log import DeadLetter, Record
from contracts.v1 import events_pb2 as pb
from feedback.log.wire import Poison, check_numbers, check_topic, decode, encode, withdrawal_for

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
    appended REAL NOT NULL,
    -- Whose event it is, said beside the bytes as well; empty for what an older version wrote.
    user TEXT NOT NULL DEFAULT '',
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
-- What came before this offset was dropped, maybe all of it: offsets go on from here.
CREATE TABLE IF NOT EXISTS expired (
    topic TEXT NOT NULL PRIMARY KEY,
    offset INTEGER NOT NULL
) WITHOUT ROWID;
-- Events that a reader could not read; their bytes stay where they are.
CREATE TABLE IF NOT EXISTS dead (
    topic TEXT NOT NULL,
    offset INTEGER NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (topic, offset)
) WITHOUT ROWID;
"""
_END = (
    "SELECT max("
    " coalesce((SELECT max(offset) + 1 FROM events WHERE topic = ?1 AND partition = 0), 0),"
    " coalesce((SELECT offset FROM expired WHERE topic = ?1), 0))"
)
_APPEND = (
    "INSERT INTO events (topic, partition, offset, id, event, appended, user)"
    " VALUES (?, 0, ?, ?, ?, ?, ?) ON CONFLICT (topic, id) DO NOTHING"
)
_READ = (
    "SELECT offset, event, user, appended FROM events"
    " WHERE topic = ? AND partition = 0 AND offset >= ? ORDER BY offset LIMIT ?"
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
# Appended in the order of offsets, by one writer at a time: the first young one ends what is old.
_FIRST_YOUNG = "SELECT min(offset) FROM events WHERE topic = ? AND partition = 0 AND appended >= ?"
_DROP = "DELETE FROM events WHERE topic = ? AND partition = 0 AND offset < ?"
_DROP_DEAD = "DELETE FROM dead WHERE topic = ? AND offset < ?"
_EXPIRED = (
    "INSERT INTO expired VALUES (?, ?)"
    " ON CONFLICT (topic) DO UPDATE SET offset = max(offset, excluded.offset)"
)
_BURY = "INSERT INTO dead VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_DEAD = (
    "SELECT topic, partition, offset, reason, event FROM dead JOIN events USING (topic, offset)"
    " ORDER BY topic, offset"
)
_REVIVE = (
    "UPDATE OR IGNORE events SET offset = ?, id = ?, event = ?, appended = ?, user = ?"
    " WHERE topic = ? AND offset = ?"
)
_REMOVE = "DELETE FROM events WHERE topic = ? AND offset = ?"
_UNBURY = "DELETE FROM dead WHERE topic = ? AND offset = ?"


class EmbeddedLog:
    """contracts.log.Log in a file. One connection writes, one reads, so that no reader waits; one
    looks for new events, for who may not even wait for other readers.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        with opening(path), only_one_opens(path.parent):
            self._writer = _connect(path)
            self._writer.executescript(_SCHEMA)
            _add_columns(self._writer, clock())
            self._reader, self._glance = _connect(path), _connect(path)
        self._glance.execute("PRAGMA busy_timeout = 0")
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    def append(self, events: Sequence[pb.Event]) -> None:
        rows = [(encode(event), event) for event in events]
        now = self._clock()
        with self._transaction() as db:
            ends: dict[str, int] = {}
            for blob, event in rows:
                topic = topic_of(event)
                if topic not in ends:
                    ends[topic] = _end(db, topic)
                added = db.execute(
                    _APPEND, (topic, ends[topic], event.id, blob, now, event.user_id)
                )
                ends[topic] += added.rowcount

    def partitions(self, topic: str) -> int:
        check_topic(topic)
        return 1

    def ends(self, topic: str) -> dict[int, int]:
        check_topic(topic)
        with self._read_lock:
            return {0: _end(self._reader, topic)}

    def ends_now(self, topic: str) -> dict[int, int]:
        """contracts.log.Local: in WAL mode no writer is waited for."""
        check_topic(topic)
        try:
            return {0: _end(self._glance, topic)}
        except sqlite3.OperationalError as e:
            raise BlockingIOError(str(e)) from e

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        _check(topic, partition)
        check_numbers(offset=offset, limit=limit)
        while True:
            with self._read_lock:
                rows = self._reader.execute(_READ, (topic, offset, limit)).fetchall()
            records = [record for row in rows if (record := self._record(topic, *row))]
            if records or not rows:
                return records
            offset = rows[-1][0] + 1

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        _check(topic, partition)
        check_numbers(offset=offset)
        with self._transaction() as db:
            db.execute(_COMMIT, (group, topic, partition, offset))

    def committed(self, group: str, topic: str, partition: int) -> int:
        _check(topic, partition)
        with self._read_lock:
            row = self._reader.execute(_COMMITTED, (group, topic, partition)).fetchone()
        return int(row[0]) if row else 0

    def erase(self, user_id: str) -> int:
        """contracts.log.Erasing: the bytes are zeroed in the database and gone from its WAL.

        Not of a dead letter whose bytes do not even say whose it is.
        """
        done = 0
        for topic in (TOPIC_OF[body] for body in TEXT_BODIES):
            after = 0
            while rows := self._mentions(topic, after, user_id):
                bare = list(_bare(rows, user_id))
                with self._transaction() as db:
                    db.executemany("UPDATE events SET event = ? WHERE rowid = ?", bare)
                done += len(bare)
                after = rows[-1][0]
        with self._write_lock:
            busy, *_ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError("erased, but a reader holds the old bytes in the log: erase again")
        return done

    def _mentions(self, topic: str, after: int, user_id: str) -> list[tuple[int, bytes]]:
        with self._read_lock:
            return self._reader.execute(_MENTIONS, (topic, after, user_id, 500)).fetchall()

    def expire(self, topic: str, before: float) -> int:
        check_topic(topic)
        with self._transaction() as db:
            first = db.execute(_FIRST_YOUNG, (topic, before)).fetchone()[0]
            first = _end(db, topic) if first is None else first
            dropped = db.execute(_DROP, (topic, first)).rowcount
            db.execute(_DROP_DEAD, (topic, first))
            db.execute(_EXPIRED, (topic, first))
        return dropped

    def dead_letters(self) -> list[DeadLetter]:
        with self._read_lock:
            return [DeadLetter(*row) for row in self._reader.execute(_DEAD)]

    def revive(self, letter: DeadLetter) -> str | None:
        try:
            event = decode(letter.topic, letter.value)
        except Poison as e:
            return str(e)
        with self._transaction() as db:
            place = (letter.topic, letter.offset)
            if db.execute(_UNBURY, place).rowcount:
                end = _end(db, letter.topic)
                row = (end, event.id, letter.value, self._clock(), event.user_id, *place)
                if not db.execute(_REVIVE, row).rowcount:  # the log has its id by now
                    db.execute(_REMOVE, place)
        return None

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._glance.close()
            self._reader.close()
            self._writer.close()

    def _record(
        self, topic: str, offset: int, blob: bytes, user: str, appended: float
    ) -> Record | None:
        try:
            return Record(topic, 0, offset, decode(topic, blob))
        except Poison as e:
            with self._transaction() as db:
                db.execute(_BURY, (topic, offset, str(e)))
        user = user or _named_in(blob)
        counts = withdrawal_for(topic, (0, offset), user, appended)
        return None if counts is None else Record(topic, 0, offset, counts)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, transaction(self._writer) as db:
            yield db


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA secure_delete = ON")
    return db


def _bare(rows: Sequence[tuple[int, bytes]], user_id: str) -> Iterator[tuple[bytes, int]]:
    """The person's own among the events at these row ids, without what was a text."""
    for at, blob in rows:
        with suppress(DecodeError):
            event = pb.Event.FromString(blob)
            if event.user_id == user_id:
                bare = without_text(event)
                bare.sealed.SetInParent()  # says that there was a text
                yield bare.SerializeToString(deterministic=True), at


def _named_in(blob: bytes) -> str:
    """Whose event this is, where that much of it can be read."""
    try:
        return pb.Event.FromString(blob).user_id
    except DecodeError:
        return ""


def _add_columns(db: sqlite3.Connection, now: float) -> None:
    """A file of version 0.1 has no dates: its events count as appended when it is first opened."""
    columns = {row[1] for row in db.execute("PRAGMA table_info(events)")}
    if "appended" not in columns:
        db.execute(f"ALTER TABLE events ADD COLUMN appended REAL NOT NULL DEFAULT {now:.6f}")
    if "user" not in columns:
        db.execute("ALTER TABLE events ADD COLUMN user TEXT NOT NULL DEFAULT ''")


def _end(db: sqlite3.Connection, topic: str) -> int:
    return int(db.execute(_END, (topic,)).fetchone()[0])


def _check(topic: str, partition: int) -> None:
    check_topic(topic)
    if partition != 0:
        raise InvalidInput("partition", "0, the only one", partition)
