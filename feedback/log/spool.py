"""A durable queue on the local disk: events wait in it until the log has them.

A row is on disk before `append` returns (SQLite, WAL, synchronous=FULL), and leaves when the log
has acknowledged it. What waits while a flush is under way shares the next one.
"""

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from contracts.database import opening
from contracts.environment import FromEnvironment
from contracts.errors import InvalidInput, LogUnavailable
from contracts.events import topic_of
from contracts.v1 import events_pb2 as pb
from feedback.log.wire import encode


class SpoolSettings(FromEnvironment):
    """INSTRUCTLOOP_SPOOL_<NAME> sets the field of that name. For a log on other machines only."""

    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_SPOOL_", frozen=True, extra="forbid")

    path: Path = Path("instructloop-data/spool.db")
    max_bytes: int = Field(default=4 << 30, ge=1 << 20)
    # At the limit: answer and keep nothing of it, which the reply says; or refuse what would be
    # kept, with 503. What is in the spool is never given up.
    when_full: Literal["answer", "refuse"] = "answer"


# New requests are asked to go unrecorded from here on; the rest is for answers under way.
ROOMY = 0.95

_SCHEMA = """
CREATE TABLE IF NOT EXISTS waiting (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    user TEXT NOT NULL,
    event BLOB NOT NULL,
    appended REAL NOT NULL
)
"""
_APPEND = "INSERT INTO waiting (event, topic, user, appended) VALUES "
# Rows of one INSERT. At every statement a thread lets go of the interpreter, and may wait for
# another one's turn to end before it has it back.
_AT_ONCE = 64
_NEXT = "SELECT seq, topic, user, event FROM waiting WHERE seq > ? ORDER BY seq LIMIT ?"
_OLDEST = "SELECT seq, appended FROM waiting ORDER BY seq LIMIT 1"
_FORGET = "DELETE FROM waiting WHERE seq IN (SELECT value FROM json_each(?))"
_SAID_BY = "SELECT event FROM waiting WHERE topic = ? AND user = ? ORDER BY seq"
_USED = (
    "SELECT (page_count - freelist_count) * page_size"
    " FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
)


class SpoolFull(LogUnavailable):
    """The spool has reached its limit, or the disk is full; nothing was written."""


class Row(NamedTuple):
    """An event that waits; `event` is its bytes."""

    seq: int
    topic: str
    user: str
    event: bytes


@dataclass(frozen=True)
class SpoolStatus:
    """What waits: events, the number of the oldest (0 without one) and seconds since it came, bytes
    on disk and their share of the limit.
    """

    depth: int
    oldest: int
    age_s: float
    bytes: int
    share: float


# The event's bytes, its topic, its person, and when it came.
_New: TypeAlias = tuple[bytes, str, str, float]


@dataclass
class _Append:
    rows: list[_New]
    done: bool = False
    error: Exception | None = None


class Spool:
    """contracts.log.EventSink of one process. Safe to call from several threads."""

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
        connect: Callable[[Path, str], sqlite3.Connection] | None = None,
    ) -> None:
        connect = connect or _connect
        self.path, self._max_bytes, self._clock = path, max_bytes, clock
        with opening(path):
            self._lock_file = _lock(path)
            self._writer = connect(path, "FULL")
            self._writer.execute(_SCHEMA)
            # A row that comes back after a power loss is sent twice, and shown once.
            self._reader = connect(path, "NORMAL")
        self._asked: list[_Append] = []
        self._gathering, self._counting = threading.Lock(), threading.Lock()
        self._writing, self._reading = threading.Lock(), threading.Lock()
        counted = "SELECT topic, count(*) FROM waiting GROUP BY topic"
        self._depth = Counter(dict(self._reader.execute(counted).fetchall()))
        self._last: int = self._reader.execute(
            "SELECT coalesce(max(seq), 0) FROM waiting"
        ).fetchone()[0]

    def append(self, events: Sequence[pb.Event]) -> None:
        """Durably, all or nothing. Raises InvalidEvent, SpoolFull."""
        now = self._clock()
        mine = _Append([(encode(e), topic_of(e), e.user_id, now) for e in events])
        with self._gathering:
            self._asked.append(mine)
        with self._writing:
            if not mine.done:
                with self._gathering:
                    asked, self._asked = self._asked, []
                self._write(asked)
        if mine.error is not None:
            raise mine.error

    def waiting(self, after: int, limit: int) -> list[Row]:
        """The next rows in the order in which they came."""
        with self._reading:
            return list(map(Row._make, self._reader.execute(_NEXT, (after, limit))))

    def forget(self, rows: Iterable[Row]) -> None:
        """The log has them."""
        rows = list(rows)
        with self._reading:
            self._reader.execute(_FORGET, (json.dumps([row.seq for row in rows]),))
        with self._counting:
            self._depth.subtract(Counter(row.topic for row in rows))

    def said_by(self, user: str, topic: str) -> list[pb.Event]:
        """What waits of the person in the topic, in the order in which it came."""
        if not self.depth(topic):
            return []
        with self._reading:
            rows = self._reader.execute(_SAID_BY, (topic, user)).fetchall()
        return [pb.Event.FromString(event) for (event,) in rows]

    def depth(self, topic: str) -> int:
        return self._depth[topic]

    def last(self) -> int:
        """The number of the row that came last."""
        return self._last

    def oldest(self) -> int | None:
        """The number of the row that waits longest."""
        with self._reading:
            row = self._reader.execute(_OLDEST).fetchone()
        return int(row[0]) if row else None

    def status(self) -> SpoolStatus:
        with self._reading:
            oldest = self._reader.execute(_OLDEST).fetchone()
            used = int(self._reader.execute(_USED).fetchone()[0])
        return _status(sum(self._depth.values()), oldest, used, self._max_bytes, self._clock())

    def has_room(self) -> bool:
        """Whether more should be let in, with a reserve for what was let in already."""
        return self.status().share < ROOMY

    def close(self) -> None:
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()
            os.close(self._lock_file)

    def _write(self, asked: Sequence[_Append]) -> None:
        rows = [row for append in asked for row in append.rows]
        error: Exception | None = None
        try:
            self._commit(rows)
        except sqlite3.Error as e:
            error = SpoolFull(f"the spool {self.path} is full: {e}") if _is_full(e) else e
        except SpoolFull as e:
            error = e
        for append in asked:
            append.done, append.error = True, error

    def _commit(self, rows: Sequence[_New]) -> None:
        used = int(self._writer.execute(_USED).fetchone()[0])
        if used + sum(len(event) for event, *_ in rows) > self._max_bytes:
            raise SpoolFull(f"the spool {self.path} holds its limit of {self._max_bytes} bytes")
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                marks = ", ".join(["(?, ?, ?, ?)"] * len(some))
                self._writer.execute(_APPEND + marks, list(chain.from_iterable(some)))
            last = self._writer.execute("SELECT last_insert_rowid()").fetchone()[0]
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise
        with self._counting:
            self._depth.update(topic for _, topic, *_ in rows)
        self._last = last


def measure(path: Path, max_bytes: int) -> SpoolStatus:
    """The status of a spool that another process may be using."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        depth = int(db.execute("SELECT count(*) FROM waiting").fetchone()[0])
        oldest = db.execute(_OLDEST).fetchone()
        used = int(db.execute(_USED).fetchone()[0])
    return _status(depth, oldest, used, max_bytes, time.time())


def _status(
    depth: int, oldest: tuple[int, float] | None, used: int, max_bytes: int, now: float
) -> SpoolStatus:
    seq, came = oldest or (0, now)
    return SpoolStatus(depth, seq, max(0.0, now - came), used, used / max_bytes)


def _connect(path: Path, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA page_size = 8192")  # seven events of a kilobyte, where 4096 takes three
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    return db


def _lock(path: Path) -> int:
    """One process at a time; the lock goes with the process, however it ends."""
    fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise InvalidInput("spool", "a file that no other server uses", str(path)) from None
    return fd


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
