"""API keys, and consent at the request."""

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contracts.access import ConsentReader, Principal
from contracts.errors import AccessDenied, NotFound

KEY_PREFIX = "il-"
KEY_BYTES = 32

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY,
    sha256 BLOB NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    production INTEGER NOT NULL,
    created REAL NOT NULL,
    revoked REAL
)
"""


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key; the key itself is shown once, when it is made. Times in seconds since
    1970.
    """

    key_id: str
    user_id: str
    production: bool
    created: float
    revoked: float | None


class KeyStore:
    """API keys in a SQLite file. Several processes may use it: each look-up reads the file.

    Only the SHA-256 of a key is stored. A slow password hash would add nothing: a key is 256 random
    bits, which no dictionary holds and nobody can search through, and it would have to be computed
    for every request.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(SCHEMA)

    def create(self, user_id: str, production: bool = False) -> tuple[str, str]:
        """A new key and its id. Completions asked for with a production key are never recorded."""
        key, key_id = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES), f"key_{secrets.token_hex(8)}"
        row = (key_id, _digest(key), user_id, production, self._clock())
        with self._lock:
            self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, NULL)", row)
        return key, key_id

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing. Raises NotFound."""
        statement = "UPDATE keys SET revoked = coalesce(revoked, ?) WHERE key_id = ?"
        with self._lock:
            if self._db.execute(statement, (self._clock(), key_id)).rowcount == 0:
                raise NotFound(f"no API key {key_id}")

    def list(self) -> list[KeyInfo]:
        """All keys, oldest first, revoked ones included."""
        columns = "key_id, user_id, production, created, revoked"
        statement = f"SELECT {columns} FROM keys ORDER BY created, key_id"  # noqa: S608  no input
        with self._lock:
            rows = self._db.execute(statement).fetchall()
        return [
            KeyInfo(i, user, bool(production), created, revoked)
            for i, user, production, created, revoked in rows
        ]

    def authenticate(self, authorization: str | None) -> Principal:
        """The owner of the key in an `Authorization: Bearer` header. Raises AccessDenied."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AccessDenied("No API key: send it as `Authorization: Bearer il-...`.")
        statement = (
            "SELECT user_id, key_id, production FROM keys WHERE sha256 = ? AND revoked IS NULL"
        )
        with self._lock:
            row = self._db.execute(statement, (_digest(key.strip()),)).fetchone()
        if row is None:
            raise AccessDenied("The API key is unknown or revoked.")
        return Principal(user_id=row[0], key_id=row[1], production=bool(row[2]))

    def close(self) -> None:
        with self._lock:
            self._db.close()


def agreed_notice(
    principal: Principal, consent: ConsentReader, *, playground: bool, shown_notice: str | None
) -> str | None:
    """The notice under which a completion of this request may be recorded; None: it may not be.

    In the Playground the person must see the very notice that they agreed to.
    """
    if principal.production:
        return None
    granted = consent.granted_notice(principal.user_id)
    if granted is None or (playground and shown_notice != granted):
        return None
    return granted


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
