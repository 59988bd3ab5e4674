"""Master keys, which wrap people's data keys: the KMS interface, and keys from file or environment.

One key a line, 32 bytes in base64; the first wraps, all unwrap.
"""

import base64
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from contracts.artifact import fsync
from contracts.database import opening
from contracts.errors import InvalidInput

ENVIRONMENT = "INSTRUCTLOOP_MASTER_KEY"
KEY_BYTES, NONCE_BYTES = 32, 12


class MasterKeys(Protocol):
    """A key management service. `context` must be the same at both ends. Safe for threads."""

    def current(self) -> str:
        """The id of the key that wraps now."""
        ...

    def wrap(self, key: bytes, context: bytes) -> tuple[str, bytes]:
        """The current master key's id, and `key` encrypted with it."""
        ...

    def unwrap(self, master_id: str, wrapped: bytes, context: bytes) -> bytes:
        """What `wrap` was given. Raises InvalidInput where the master key is not known."""
        ...


class LocalMasterKeys:
    """Master keys that this process holds. A file is read again when it was replaced, so a running
    server follows a rotation.
    """

    def __init__(self, keys: list[bytes], file: Path | None = None) -> None:
        self._file, self._seen = file, (0, 0)
        self._ciphers: dict[str, AESGCM] = {}
        self._take(keys)

    @classmethod
    def at(cls, file: Path, environment: Mapping[str, str]) -> "LocalMasterKeys":
        """From the environment, comma-separated; else from `file`, made with a fresh key."""
        if said := environment.get(ENVIRONMENT):
            return cls([_decoded(ENVIRONMENT, key) for key in said.split(",")])
        with opening(file):
            if not file.exists():
                _create(file, secrets.token_bytes(KEY_BYTES))
            return cls(_read(file), file)

    def current(self) -> str:
        self._follow()
        return self._current

    def wrap(self, key: bytes, context: bytes) -> tuple[str, bytes]:
        master_id, nonce = self.current(), secrets.token_bytes(NONCE_BYTES)
        return master_id, nonce + self._ciphers[master_id].encrypt(nonce, key, context)

    def unwrap(self, master_id: str, wrapped: bytes, context: bytes) -> bytes:
        if master_id not in self._ciphers:
            self._follow()
        cipher = self._ciphers.get(master_id)
        try:
            if cipher is not None:
                return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], context)
        except InvalidTag:
            pass
        where = self._file or ENVIRONMENT
        raise InvalidInput(f"master key in {where}", f"the one named {master_id}", self._current)

    def add(self) -> str:
        """A fresh key that wraps from now on; the old ones still unwrap. Returns its id."""
        file = self._own_file()
        fresh = secrets.token_bytes(KEY_BYTES)
        self._write(file, [fresh, *_read(file)])
        return self.current()

    def keep_only_current(self) -> None:
        """Forget the old keys: what they wrapped, in backups too, cannot be unwrapped again."""
        file = self._own_file()
        self._write(file, _read(file)[:1])

    def _own_file(self) -> Path:
        if self._file is None:
            raise InvalidInput(
                ENVIRONMENT, "NEW,OLD there, to rotate a key from the environment", "a rotation"
            )
        return self._file

    def _write(self, file: Path, keys: list[bytes]) -> None:
        aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
        _create(aside, *keys)
        aside.rename(file)
        fsync(file.parent)
        self._take(keys)

    def _follow(self) -> None:
        if self._file is None:
            return
        stat = self._file.stat()
        if (seen := (stat.st_ino, stat.st_mtime_ns)) != self._seen:
            self._take(_read(self._file))
            self._seen = seen

    def _take(self, keys: list[bytes]) -> None:
        """Old keys stay known to this process: it may have read what they wrapped just before."""
        self._ciphers = self._ciphers | {_name(key): AESGCM(key) for key in keys}
        self._current = _name(keys[0])


def _name(key: bytes) -> str:
    return hashlib.sha256(b"instructloop master key\0" + key).hexdigest()[:12]


def _decoded(where: str, text: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidInput(where, f"keys of {KEY_BYTES} bytes in base64", f"{len(text)} characters")
    return key


def _read(file: Path) -> list[bytes]:
    lines = file.read_text(encoding="ascii", errors="replace").split()
    if not lines:
        raise InvalidInput(str(file), "a master key", "an empty file")
    return [_decoded(str(file), line) for line in lines]


def _create(file: Path, *keys: bytes) -> None:
    """Durably, readable by the owner alone; who comes second to the same name uses the first's."""
    text = "".join(base64.b64encode(key).decode() + "\n" for key in keys)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    try:
        os.link(aside, file)
    except FileExistsError:
        pass
    finally:
        aside.unlink()
    fsync(file.parent)
