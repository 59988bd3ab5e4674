"""Data keys, one person's after another, in a SQLite file; each wrapped by a master key.

Nothing is cached: every batch of events asks the file, so an erasure counts at once for every
process.
"""

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from contracts.database import only_one_opens, opening, transaction
from feedback.vault.master import KEY_BYTES, LocalMasterKeys, MasterKeys

_SCHEMA = """
CREATE TABLE IF NOT EXISTS data_keys (
    key_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE,
    master_id TEXT NOT NULL,
    wrapped BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS erased (
    user_id TEXT PRIMARY KEY,
    -- Seconds since 1970 of the last erasure; what was written without a key before it is erased.
    at REAL NOT NULL,
    -- 1 from the erasure until the person agrees again: no key is made for them meanwhile.
    closed INTEGER NOT NULL
) WITHOUT ROWID;
"""
_AT_ONCE = 500


class KeyVault:
    """Several threads and processes may use it."""

    def __init__(
        self, path: Path, master: MasterKeys, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self._master, self._clock = path, master, clock
        self._lock = threading.Lock()
        with opening(path), only_one_opens(path.parent):
            self._db = sqlite3.connect(
                path, check_same_thread=False, isolation_level=None, timeout=30
            )
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_SCHEMA)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA secure_delete = ON")

    def keys_for(self, users: Iterable[str]) -> dict[str, tuple[str, bytes]]:
        """User id to (key id, data key), made where a person has none; without those who erased
        their data and did not agree again.
        """
        wanted = set(users)
        with self._lock:
            found = self._select("user_id", wanted)
            if missing := wanted - {user for _, user, _, _ in found}:
                with transaction(self._db):
                    self._make(missing)
                found = self._select("user_id", wanted)
        return {user: (key, self._unwrap(*row)) for row in found for key, user, *_ in [row]}

    def keys_named(self, key_ids: Iterable[str]) -> dict[str, bytes]:
        """Key id to data key, of those that were not erased."""
        with self._lock:
            found = self._select("key_id", set(key_ids))
        return {row[0]: self._unwrap(*row) for row in found}

    def erase(self, user_id: str) -> None:
        """Delete the person's key, from the file's bytes too, and make none until `readmit`."""
        with self._lock:
            with transaction(self._db):
                self._db.execute("DELETE FROM data_keys WHERE user_id = ?", (user_id,))
                self._db.execute(
                    "INSERT INTO erased VALUES (?, ?, 1) ON CONFLICT (user_id)"
                    " DO UPDATE SET at = excluded.at, closed = 1",
                    (user_id, self._clock()),
                )
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def readmit(self, users: Iterable[str]) -> None:
        """They agree again: what comes from now on gets a new key; what was erased stays so."""
        with self._lock, transaction(self._db):
            self._db.executemany(
                "UPDATE erased SET closed = 0 WHERE user_id = ?", [(user,) for user in users]
            )

    def erased_at(self) -> Mapping[str, float]:
        """User id to the time of the last erasure, in seconds since 1970."""
        with self._lock:
            return dict(self._db.execute("SELECT user_id, at FROM erased"))

    def rewrap(self) -> int:
        """Wrap every data key by the current master key; returns how many were not yet."""
        done = 0
        while True:
            with self._lock, transaction(self._db):
                rows = self._db.execute(
                    "SELECT key_id, user_id, master_id, wrapped FROM data_keys"
                    " WHERE master_id <> ? LIMIT ?",
                    (self._master.current(), _AT_ONCE),
                ).fetchall()
                for row in rows:
                    wrapped = self._master.wrap(self._unwrap(*row), _context(row[0], row[1]))
                    self._db.execute(
                        "UPDATE data_keys SET master_id = ?, wrapped = ? WHERE key_id = ?",
                        (*wrapped, row[0]),
                    )
            if not rows:
                break
            done += len(rows)
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return done

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _make(self, users: set[str]) -> None:
        closed = {u for (u,) in self._db.execute("SELECT user_id FROM erased WHERE closed = 1")}
        rows = []
        for user in sorted(users - closed):
            key_id = secrets.token_hex(16)
            key = secrets.token_bytes(KEY_BYTES)
            rows.append((key_id, user, *self._master.wrap(key, _context(key_id, user))))
        self._db.executemany("INSERT OR IGNORE INTO data_keys VALUES (?, ?, ?, ?)", rows)

    def _select(self, column: str, values: set[str]) -> list[tuple[str, str, str, bytes]]:
        rows, left = [], sorted(values)
        while left:
            some, left = left[:_AT_ONCE], left[_AT_ONCE:]
            marks = ", ".join("?" * len(some))
            rows += self._db.execute(
                "SELECT key_id, user_id, master_id, wrapped FROM data_keys"  # noqa: S608  no input
                f" WHERE {column} IN ({marks})",
                some,
            ).fetchall()
        return rows

    def _unwrap(self, key_id: str, user_id: str, master_id: str, wrapped: bytes) -> bytes:
        return self._master.unwrap(master_id, wrapped, _context(key_id, user_id))


def rotate(vault: KeyVault, master: LocalMasterKeys) -> int:
    """A fresh master key takes over while servers run; returns how many data keys it wraps.

    Keys are made in transactions that look at the master key first, so what another process wrapped
    by the old one is rewrapped here, or was wrapped by the new one.
    """
    master.add()
    done = vault.rewrap()
    master.keep_only_current()
    return done


def _context(key_id: str, user_id: str) -> bytes:
    return f"{key_id}\0{user_id}".encode()
