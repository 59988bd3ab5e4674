"""What our SQLite files have in common: how they are opened, and that writing is all or nothing."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contracts.errors import InvalidInput


@contextmanager
def opening(file: Path) -> Iterator[None]:
    """Make the folder of a file that is opened inside. Raises InvalidInput, by the file's name,
    where either fails: what SQLite says names none.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, sqlite3.DatabaseError) as e:
        raise InvalidInput(str(file), "a file that can be read and written", str(e)) from e


@contextmanager
def only_one_opens(folder: Path) -> Iterator[None]:
    """The switch to WAL fails at once, without waiting, when two processes try it on a new file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing; IMMEDIATE, since a read lock cannot always be raised to a write lock."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
