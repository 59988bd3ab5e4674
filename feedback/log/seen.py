"""Which records of a topic repeat an id that stands before them."""

import json
import sqlite3
from collections.abc import Iterable

from contracts.log import Record

# What is told at once is one statement, and so one transaction.
_ADD = "INSERT OR IGNORE INTO seen SELECT ?, ?, key, value FROM json_each(?)"


class SeenIds:
    """Every id of some partitions with its first offset, in a temporary file that SQLite makes
    when it outgrows the cache. Not safe to call from several threads.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(
            "CREATE TABLE seen (topic TEXT, partition INTEGER, id TEXT, offset INTEGER,"
            " PRIMARY KEY (topic, partition, id)) WITHOUT ROWID"
        )
        # Offset up to which a partition was gone through.
        self._known: dict[tuple[str, int], int] = {}
        self._copies: dict[tuple[str, int], set[int]] = {}

    def known(self, topic: str, partition: int) -> int:
        """The offset up to which `add` was told every record."""
        return self._known.get((topic, partition), 0)

    def add(self, topic: str, partition: int, records: Iterable[Record], end: int) -> None:
        """All records from `known` to `end`, in order; what stands before is left out."""
        place = (topic, partition)
        known = self.known(topic, partition)
        new = [(offset, event.id) for _, _, offset, event in records if offset >= known]
        first: dict[str, int] = {}
        for offset, id in new:
            first.setdefault(id, offset)
        done = self._db.execute(_ADD, (*place, json.dumps(first)))
        if done.rowcount < len(new):
            copies = self._copies.setdefault(place, set())
            copies.update(offset for offset, id in new if self._first(*place, id) != offset)
        self._known[place] = max(end, known)

    def copies(self, topic: str, partition: int) -> set[int]:
        """Offsets of the records that repeat an id."""
        return self._copies.get((topic, partition), set())

    def close(self) -> None:
        self._db.close()

    def _first(self, topic: str, partition: int, id: str) -> int:
        row = self._db.execute(
            "SELECT offset FROM seen WHERE topic = ? AND partition = ? AND id = ?",
            (topic, partition, id),
        ).fetchone()
        return int(row[0])
