"""Release and ReleaseRegistry: publish, current, history, rollback, all atomic.

On disk, below the registry's root:

    artifacts/<digest>/...       the weights, config and tokenizer (contracts.artifact)
    releases/<id>.json           one Release, written once
    history.jsonl                one line for each time that `current` changed
    current                      the id of the release that servers should serve; replaced by rename
"""

import datetime as dt
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from contracts.artifact import ArtifactStore, write_text_durably
from contracts.errors import InvalidInput, NotFound


class Canary(BaseModel):
    """A prompt and what the trainer's own forward pass says of it, to be compared after a swap."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[int, ...]
    # log p(token_ids[i] | token_ids[:i]) in nats for i = 1..n-1, float32.
    logprobs: tuple[float, ...]


class Release(BaseModel):
    """A model that may be served, and where it came from. Digests are of the same registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    model: str
    created: dt.datetime
    # The policy: safetensors, config and tokenizer.
    artifact: str
    canary: Canary
    # None for a model that was brought from outside.
    parent: str | None = None
    dataset: str | None = None
    reward_model: str | None = None
    code_version: str
    # The figures that the gate saw.
    evaluation: dict[str, float] = {}


class ReleaseRegistry:
    """Releases below `root`. Many readers; one writer at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = ArtifactStore(root / "artifacts")

    def publish(self, release: Release) -> None:
        """Make `release` known and current. Raises NotFound without its artifacts, InvalidInput."""
        for digest in filter(None, (release.artifact, release.dataset, release.reward_model)):
            self.artifacts.path(digest)
        file = self._file(release.id)
        if file.exists() and self.get(release.id) != release:
            raise InvalidInput("release.id", "an id that is not taken", release.id)
        write_text_durably(file, release.model_dump_json(indent=1))
        self._set_current(release.id, "published")

    def get(self, release_id: str) -> Release:
        """Raises NotFound."""
        try:
            return Release.model_validate_json(self._file(release_id).read_bytes())
        except FileNotFoundError:
            raise NotFound(f"no release {release_id} in {self.root}") from None

    def current(self) -> Release | None:
        """The release that servers should serve; None before the first."""
        release_id = self.current_id()
        return self.get(release_id) if release_id else None

    def current_id(self) -> str | None:
        try:
            return (self.root / "current").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def all(self) -> list[Release]:
        """Every release that was published, in the order of their ids."""
        return [self.get(file.stem) for file in sorted((self.root / "releases").glob("*.json"))]

    def history(self) -> list[str]:
        """Ids in the order in which they became current; the last one is current."""
        try:
            lines = (self.root / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line)["release"] for line in lines]

    def next_id(self, artifact: str) -> str:
        """A readable id: r, a number that grows, and the head of the artifact's digest."""
        taken = len(list((self.root / "releases").glob("*.json")))
        return f"r{taken + 1:04d}-{artifact[:8]}"

    def rollback(self) -> Release:
        """Make the current release's parent current again. Raises NotFound where it has none."""
        history = self.history()
        if not history:
            raise NotFound("nothing is released yet, so there is nothing to roll back to")
        current = self.get(history[-1])
        if current.parent is None:
            raise NotFound(f"release {current.id} has no parent to roll back to")
        self._set_current(current.parent, "rolled back")
        return self.get(current.parent)

    def _file(self, release_id: str) -> Path:
        if not release_id or "/" in release_id or release_id.startswith("."):
            raise InvalidInput("release.id", "a name without slashes", release_id)
        return self.root / "releases" / f"{release_id}.json"

    def _set_current(self, release_id: str, why: str) -> None:
        if self.current_id() == release_id:
            return
        line = json.dumps(
            {"release": release_id, "why": why, "at": dt.datetime.now(dt.UTC).isoformat()}
        )
        with (self.root / "history.jsonl").open("a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        write_text_durably(self.root / "current", release_id)
