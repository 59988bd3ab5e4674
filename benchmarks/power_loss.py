"""A disk that loses every write that was not synced, as SQLite sees one when the power fails.

Writes go through to the file and are remembered with what they replaced, until the file is synced.
`Disk.fail` copies the files and takes the remembered writes back.
"""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import apsw

_NAME = "losing"


class Disk(apsw.VFS):
    """One of these at a time; SQLite finds it by its name."""

    def __init__(self) -> None:
        # File > (offset, what stood there, size before) of every write since the last sync.
        self.unsynced: dict[str, list[tuple[int, bytes, int]]] = {}
        super().__init__(_NAME, "")

    def xOpen(self, name: Any, flags: list[int]) -> "_File":  # noqa: N802
        return _File(name, flags, self)

    def connect(self, path: Path, synchronous: str) -> sqlite3.Connection:
        """A connection with what the spool uses of one."""
        db = apsw.Connection(str(path), vfs=_NAME)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        return cast(sqlite3.Connection, db)

    def weak(self, path: Path, synchronous: str) -> sqlite3.Connection:
        """The same, but nothing is synced at a commit."""
        return self.connect(path, "NORMAL")

    def fail(self, folder: Path, copy: Path) -> None:
        """The files of `folder` as they are found after the power came back."""
        copy.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name.endswith("-shm"):  # memory
                continue
            shutil.copyfile(file, copy / file.name)
            with (copy / file.name).open("r+b") as found:
                for offset, before, size in reversed(self.unsynced.get(str(file), [])):
                    found.seek(offset)
                    found.write(before)
                    found.truncate(size)


class _File(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], disk: Disk) -> None:
        super().__init__("", name, flags)
        self.path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self.disk = disk

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._remember(offset, len(data))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._remember(size, max(0, self.xFileSize() - size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.unsynced.pop(self.path, None)

    def _remember(self, offset: int, length: int) -> None:
        size = self.xFileSize()
        there = max(0, min(length, size - offset))
        before = super().xRead(there, offset) if there else b""
        self.disk.unsynced.setdefault(self.path, []).append((offset, before, size))


Connect = Callable[[Path, str], sqlite3.Connection]
