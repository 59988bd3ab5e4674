"""Rollout: which replica serves which release, and the turn to drain.

On disk, below the registry's root:

    replicas/<replica>.json      one Replica, rewritten by it every few seconds until it ends
    drain-turn                   held by the one replica that drains
"""

import datetime as dt
import fcntl
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.artifact import write_text_durably
from contracts.errors import InvalidInput

BEAT_S = 5.0
LOST_AFTER_S = 6 * BEAT_S
FORGOTTEN_AFTER_S = 24 * 3600.0


class Replica(BaseModel):
    """What one server says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    at: dt.datetime
    # loading, serving, staging, waiting (for its turn to drain) or swapping.
    state: str
    # Whether an operator took it out of service: it is not ready, and answers what still comes.
    draining: bool
    # Answers that it works on.
    running: int
    # What its answers are made by; None while loading.
    serving: str | None
    # What it should serve by what it read last.
    target: str | None
    # Why it does not serve the target, where it refused that or went back from it.
    reason: str | None = None

    def is_lost(self, now: dt.datetime) -> bool:
        """Whether it should have been heard of since."""
        return (now - self.at).total_seconds() > LOST_AFTER_S


class Rollout:
    """The replicas of one registry. Each writes its own record and reads all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def report(self, replica: Replica) -> None:
        write_text_durably(self._file(replica.name), replica.model_dump_json())

    def remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def replicas(self, now: dt.datetime) -> list[Replica]:
        """By name, lost ones included for a day."""
        found = []
        for file in sorted((self._root / "replicas").glob("*.json")):
            try:
                replica = Replica.model_validate_json(file.read_bytes())
            except (FileNotFoundError, ValidationError):  # it ended just now; another version's
                continue
            if (now - replica.at).total_seconds() < FORGOTTEN_AFTER_S:
                found.append(replica)
        return found

    def take_turn(self) -> TextIO | None:
        """The turn to drain, until the result is closed or the process ends; None where another
        has it.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        turn = (self._root / "drain-turn").open("a")
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            turn.close()
            return None
        return turn

    def _file(self, name: str) -> Path:
        if not name or "/" in name or name.startswith("."):
            raise InvalidInput("replica", "a name without slashes", name)
        return self._root / "replicas" / f"{name}.json"
