"""Release and ReleaseRegistry: publish, current, pin, history, rollback, all atomic.

On disk, below the registry's root:

    artifacts/<digest>/...       the weights, config and tokenizer (contracts.artifact)
    releases/<id>.json           one Release, written once
    history.jsonl                one line for each time that what servers should serve changed
    current                      the id that was published, or rolled back to, last
    pinned                       the id that servers should serve whatever is current; absent: none
    shares.json                  parts of the people that other releases answer; absent: none
    lock                         held by who changes any of these
    replicas/ drain-turn         who serves what, and who may drain (contracts.rollout)
"""

import datetime as dt
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from contracts.artifact import ArtifactStore, fsync, write_text_durably
from contracts.errors import CorruptArtifact, InvalidInput, NotFound
from contracts.rollout import Rollout
from contracts.shares import Shares

# It names a file.
RELEASE_ID = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,99}"


class Canary(BaseModel):
    """A prompt and what the trainer's own forward pass says of it, to be compared after a swap."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=2)
    # log p(token_ids[i] | token_ids[:i]) in nats for i = 1..n-1, float32.
    logprobs: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _one_for_each_token_but_the_first(self) -> Self:
        if len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(
                f"expected {len(self.token_ids) - 1} logprobs for {len(self.token_ids)} tokens, "
                f"got {len(self.logprobs)}"
            )
        return self


class Release(BaseModel):
    """A model that may be served, and where it came from. Digests are of the same registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    model: str
    created: dt.datetime
    # The policy: safetensors, config and tokenizer; where there is a `base`, an adapter of that one
    # in peft's format.
    artifact: str
    # The policy artifact that an adapter adapts; None for a release that is whole.
    base: str | None = None
    canary: Canary
    # None for a model that was brought from outside.
    parent: str | None = None
    dataset: str | None = None
    reward_model: str | None = None
    code_version: str
    # The figures that the gate saw, of those that are numbers.
    evaluation: dict[str, FiniteFloat] = {}


class Turn(BaseModel):
    """One line of the history: from `at` on, servers should serve `release`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    release: str
    why: str
    at: dt.datetime


class ReleaseRegistry:
    """Releases below `root`. Many readers; writers take turns by a lock that ends with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = ArtifactStore(root / "artifacts")
        self.rollout = Rollout(root)

    def publish(self, release: Release) -> None:
        """Make `release` known and current. Raises NotFound without its artifacts, InvalidInput.

        Where a release is pinned, servers stay on that one.
        """
        named = (release.artifact, release.base, release.dataset, release.reward_model)
        for digest in filter(None, named):
            self.artifacts.path(digest)
        with self._writing():
            self._record(release)
            self._set_current(release.id, "published")

    def add(self, release: Release) -> None:
        """Make `release` known, so that servers can be sent to it. Its artifact need not be there:
        they were handed its weights. Raises InvalidInput.
        """
        with self._writing():
            self._record(release)

    def check_id(self, release: Release) -> None:
        """Raise InvalidInput where the id names no file, or another release."""
        if self._file(release.id).exists() and self.get(release.id) != release:
            raise InvalidInput("release.id", "an id that is not taken", release.id)

    def get(self, release_id: str) -> Release:
        """Raises NotFound, or CorruptArtifact for a record that is damaged or of another id."""
        try:
            release = Release.model_validate_json(self._file(release_id).read_bytes())
        except FileNotFoundError:
            raise NotFound(f"no release {release_id} in {self.root}") from None
        except ValidationError as e:
            where = ".".join(str(part) for part in e.errors()[0]["loc"]) or "JSON"
            raise CorruptArtifact(
                f"release {release_id}: {where}: {e.errors()[0]['msg']}"
            ) from None
        if release.id != release_id:
            raise CorruptArtifact(f"release {release_id}: the record is of {release.id!r}")
        return release

    def releases(self) -> list[Release]:
        """Every release that can be read, oldest first."""
        found = []
        for file in (self.root / "releases").glob("*.json"):
            try:
                found.append(self.get(file.stem))
            except (NotFound, CorruptArtifact):
                continue
        return sorted(found, key=lambda release: (release.created, release.id))

    def current(self) -> Release | None:
        """What was published, or rolled back to, last; None before the first."""
        release_id = self.current_id()
        return self.get(release_id) if release_id else None

    def current_id(self) -> str | None:
        return self._read("current")

    def pinned_id(self) -> str | None:
        """What servers should serve whatever is current; None where they follow."""
        return self._read("pinned")

    def target_id(self) -> str | None:
        """What servers should serve: the pinned release or, where none is, the current one."""
        return self.pinned_id() or self.current_id()

    def all(self) -> list[Release]:
        """Every release that was published, in the order of their ids."""
        return [self.get(file.stem) for file in sorted((self.root / "releases").glob("*.json"))]

    def whole(self, artifact: str) -> Release:
        """The last release of exactly this policy. Raises NotFound."""
        found = [r for r in self.releases() if r.artifact == artifact and r.base is None]
        if not found:
            raise NotFound(f"no release of the policy {artifact} in {self.root}")
        return found[-1]

    def shares(self) -> Shares:
        """Which part of the people is answered by another release. Raises CorruptArtifact."""
        try:
            return Shares.model_validate_json(self._read("shares.json") or "{}")
        except ValidationError as e:
            raise CorruptArtifact(f"{self.root / 'shares.json'}: {e.errors()[0]['msg']}") from None

    def share(self, release_id: str, share: float) -> Shares:
        """Let this release answer a part of the people, 0 for none; all shares as they are then.
        Raises NotFound, InvalidInput.
        """
        with self._writing():
            shares = self.shares().having(release_id, share)
            if share:
                self.get(release_id)
            write_text_durably(self.root / "shares.json", shares.model_dump_json())
        return shares

    def history(self) -> list[str]:
        """Ids in the order in which servers should have served them; the last one is the target."""
        return [turn.release for turn in self.turns()]

    def turns(self) -> list[Turn]:
        """The history with reasons and times."""
        try:
            lines = (self.root / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Turn.model_validate_json(line) for line in lines]

    def next_id(self, artifact: str) -> str:
        """A readable id: r, a number that grows, and the head of the artifact's digest."""
        taken = len(list((self.root / "releases").glob("*.json")))
        return f"r{taken + 1:04d}-{artifact[:8]}"

    def swap_to(self, release_id: str) -> Release:
        """Make a known release current. Raises NotFound, InvalidInput where another is pinned."""
        with self._writing():
            release, pinned = self.get(release_id), self.pinned_id()
            if pinned not in (None, release_id):
                raise InvalidInput("release", f"{pinned}, which is pinned", release_id)
            self._set_current(release_id, "swapped to")
        return release

    def pin(self, release_id: str | None = None) -> Release:
        """Keep servers on a release, by default the one they should serve now, until `unpin`.
        Raises NotFound.
        """
        with self._writing():
            release = self.get(release_id or self._target())
            self._note(release.id, "pinned", self.target_id())
            write_text_durably(self.root / "pinned", release.id)
        return release

    def unpin(self) -> str | None:
        """Let servers follow what is current again, and return its id."""
        with self._writing():
            pinned, current = self.pinned_id(), self.current_id()
            if pinned is not None:
                if current is not None:
                    self._note(current, "unpinned", pinned)
                (self.root / "pinned").unlink()
                fsync(self.root)
        return current

    def rollback(self) -> Release:
        """Send servers back to the parent of what they should serve now. Raises NotFound where it
        has none. A pin moves along.
        """
        with self._writing():
            now = self.get(self._target())
            if now.parent is None:
                raise NotFound(f"release {now.id} has no parent to roll back to")
            parent = self.get(now.parent)
            if self.pinned_id() is None:
                self._set_current(parent.id, "rolled back")
            else:
                self._note(parent.id, "rolled back", now.id)
                write_text_durably(self.root / "pinned", parent.id)
        return parent

    def _file(self, release_id: str) -> Path:
        if not re.fullmatch(RELEASE_ID, release_id):
            expected = "a name without slashes: up to 100 letters, digits, dots and dashes"
            raise InvalidInput("release.id", expected, release_id)
        return self.root / "releases" / f"{release_id}.json"

    def _read(self, name: str) -> str | None:
        try:
            return (self.root / name).read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def _target(self) -> str:
        if (target := self.target_id()) is None:
            raise NotFound("nothing is released yet, so there is nothing to roll back to or to pin")
        return target

    def _record(self, release: Release) -> None:
        self.check_id(release)
        write_text_durably(self._file(release.id), release.model_dump_json(indent=1))

    def _set_current(self, release_id: str, why: str) -> None:
        if self.pinned_id() is None:
            self._note(release_id, why, self.current_id())
        write_text_durably(self.root / "current", release_id)

    def _note(self, release_id: str, why: str, before: str | None) -> None:
        """A line of history, where servers should serve something else than `before` now."""
        if release_id == before:
            return
        line = json.dumps(
            {"release": release_id, "why": why, "at": dt.datetime.now(dt.UTC).isoformat()}
        )
        with (self.root / "history.jsonl").open("a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
