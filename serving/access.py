"""API keys, what each opens, and consent at the request."""

import hashlib
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase

from contracts.access import (
    SCOPES,
    USER_SCOPES,
    Authenticate,
    ConsentReader,
    Principal,
    Scope,
)
from contracts.database import opening
from contracts.errors import AccessDenied, InvalidInput, NotFound, Unauthenticated
from serving.limits import Limiter
from serving.telemetry import visit_of

KEY_PREFIX = "il-"
KEY_BYTES = 32
# It stands in a header.
PROJECT = re.compile(r"[\x21-\x7e]{1,64}")

# One step for each version of the file; PRAGMA user_version says how many are done.
SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS keys (
        key_id TEXT PRIMARY KEY,
        sha256 BLOB NOT NULL UNIQUE,
        user_id TEXT NOT NULL,
        production INTEGER NOT NULL,
        created REAL NOT NULL,
        revoked REAL
    );
    """,
    """
    ALTER TABLE keys ADD COLUMN scopes TEXT NOT NULL DEFAULT 'complete feedback';
    ALTER TABLE keys ADD COLUMN project TEXT NOT NULL DEFAULT 'default';
    ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER;
    ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER;
    """,
)
COLUMNS = (
    "key_id, user_id, production, scopes, project, requests_per_minute, tokens_per_minute, "
    "created, revoked"
)


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key; the key itself is shown once, when it is made. Times in seconds since
    1970.
    """

    principal: Principal
    created: float
    revoked: float | None


class KeyStore:
    """API keys in a SQLite file. Several processes may use it: each look-up reads the file, of
    which SQLite's journal lets it read without waiting for a writer.

    Only the SHA-256 of a key is stored. A slow password hash would add nothing: a key is 256 random
    bits, which no dictionary holds and nobody can search through, and it would have to be computed
    for every request.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock, self._looking = threading.Lock(), threading.Lock()
        with opening(path):
            shared: dict[str, Any] = {"check_same_thread": False, "isolation_level": None}
            self._db = sqlite3.connect(path, timeout=10, **shared)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._migrate()
            self._looks = sqlite3.connect(path, **shared)

    def create(
        self,
        user_id: str,
        production: bool = False,
        scopes: Iterable[Scope] = USER_SCOPES,
        project: str = "default",
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[str, str]:
        """A new key and its id. Completions asked for with a production key are never recorded.

        Limits are a minute's, 0 for none, None for the server's. Raises InvalidInput.
        """
        scopes = frozenset(scopes)
        if not scopes or scopes - set(SCOPES):
            raise InvalidInput("scopes", f"some of {', '.join(SCOPES)}", sorted(scopes))
        if not user_id.strip():
            raise InvalidInput("user", "a name", user_id)
        if not PROJECT.fullmatch(project):
            raise InvalidInput("project", "1 to 64 characters of ASCII, none a space", project)
        for name, limit in (
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
        ):
            if limit is not None and limit < 0:
                raise InvalidInput(name, "a number from 0, for no limit, on", limit)
        key, key_id = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES), f"key_{secrets.token_hex(8)}"
        row = (
            *(key_id, user_id, production, " ".join(sorted(scopes)), project),
            *(requests_per_minute, tokens_per_minute, self._clock(), None, _digest(key)),
        )
        statement = f"INSERT INTO keys ({COLUMNS}, sha256) VALUES (?,?,?,?,?,?,?,?,?,?)"  # noqa: S608
        with self._lock:
            self._db.execute(statement, row)
        return key, key_id

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing. Raises NotFound."""
        statement = "UPDATE keys SET revoked = coalesce(revoked, ?) WHERE key_id = ?"
        with self._lock:
            if self._db.execute(statement, (self._clock(), key_id)).rowcount == 0:
                raise NotFound(f"no API key {key_id}")

    def list(self) -> list[KeyInfo]:
        """All keys, oldest first, revoked ones included."""
        statement = f"SELECT {COLUMNS} FROM keys ORDER BY created, key_id"  # noqa: S608  no input
        with self._lock:
            rows = self._db.execute(statement).fetchall()
        return [KeyInfo(_principal(row), *row[-2:]) for row in rows]

    def authenticate(self, authorization: str | None) -> Principal:
        """The owner of the key in an `Authorization: Bearer` header. Raises Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("No API key: send it as `Authorization: Bearer il-...`.")
        statement = f"SELECT {COLUMNS} FROM keys WHERE sha256 = ? AND revoked IS NULL"  # noqa: S608
        with self._looking:
            row = self._looks.execute(statement, (_digest(key.strip()),)).fetchone()
        if row is None:
            raise Unauthenticated("The API key is unknown or revoked.")
        return _principal(row)

    def _migrate(self) -> None:
        """Bring the file to this version; another process may do the same at the same time."""
        self._db.execute("BEGIN IMMEDIATE")
        (done,) = self._db.execute("PRAGMA user_version").fetchone()
        for step in SCHEMA[done:]:
            for statement in filter(str.strip, step.split(";")):
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {max(done, len(SCHEMA))}")
        self._db.execute("COMMIT")

    def close(self) -> None:
        with self._lock, self._looking:
            self._looks.close()
            self._db.close()


class Door(SecurityBase):
    """The dependency of every route: nobody comes in without a key, and no key opens all."""

    def __init__(self, authenticate: Authenticate, organization: str, limiter: Limiter) -> None:
        self._authenticate, self._organization = authenticate, organization
        self._limiter = limiter
        self.model, self.scheme_name = HTTPBearer(description="An API key."), "key"

    async def __call__(self, request: Request) -> Principal:
        """Who asks; the request counts against the key's limit. Raises LimitReached, and
        Unauthenticated, also where a header names what the key is not of.
        """
        headers = request.headers
        # On the event loop: it waits for nobody, and a thread would cost more than the look-up.
        who = self._authenticate(headers.get("authorization"))
        visit = visit_of(request.scope)
        visit.facts |= {"key_id": who.key_id, "project": who.project}
        if headers.get("openai-organization") not in (None, "", self._organization):
            raise Unauthenticated(
                "OpenAI-Organization header should match organization for API key",
                "mismatched_organization",
            )
        if headers.get("openai-project") not in (None, "", who.project):
            raise Unauthenticated(
                "OpenAI-Project header should match project for API key", "mismatched_project"
            )
        left = await self._limiter.aside(self._limiter.take_request, who)
        visit.headers |= {"openai-project": who.project, **left}
        return who

    def opens(self, *scopes: Scope) -> Callable[..., Awaitable[Principal]]:
        """A dependency for routes that a key with any of `scopes` opens. Raises AccessDenied."""

        async def allowed(who: Annotated[Principal, Depends(self)]) -> Principal:
            if who.scopes.isdisjoint(scopes):
                raise AccessDenied(
                    "You have insufficient permissions for this operation. "
                    f"Missing scopes: {' or '.join(scopes)}.",
                    "missing_scope",
                )
            return who

        return allowed


def agreed_notice(
    principal: Principal,
    consent: ConsentReader,
    playground: bool,
    shown_notice: str | None,
    *,
    wait: bool = True,
) -> str | None:
    """The notice under which a completion of this request may be recorded; None: it may not be.

    In the Playground the person must see the very notice that they agreed to. Without `wait`
    raises BlockingIOError where the answer takes waiting.
    """
    if principal.production:
        return None
    granted = consent.granted_notice(principal.user_id, wait=wait)
    if granted is None or (playground and shown_notice != granted):
        return None
    return granted


def _principal(row: tuple[Any, ...]) -> Principal:
    key_id, user_id, production, scopes, project, requests, tokens, *_ = row
    known = frozenset(scope for scope in SCOPES if scope in scopes.split())
    return Principal(user_id, key_id, bool(production), known, project, requests, tokens)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
