"""The review queue: a person confirms what a dataset holds before a model is trained on it."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.artifact import fsync
from contracts.dataset import SETS
from contracts.release import ReleaseRegistry
from feedback.dataset.lineage import manifest_of


@dataclass(frozen=True)
class Waiting:
    """A row that nobody decided on: its id, the kinds that were masked, its texts as masked."""

    row: str
    set: str
    masked: tuple[str, ...]
    prompt: str
    responses: tuple[str, ...]


class Reviews:
    """Decisions of reviewers below a registry, one line each; the last one on a row counts.

    A decision names the row and no text. It is about the event, so it holds for later datasets too.
    """

    def __init__(self, registry: ReleaseRegistry) -> None:
        self._registry = registry
        self._file = registry.root / "reviews.jsonl"

    def decisions(self) -> dict[str, bool]:
        """Row id to whether it may be used."""
        return {line["row"]: line["keep"] for line in self._lines()}

    def decide(self, row: str, keep: bool, reviewer: str, at: float) -> None:
        """Durable when it returns; `at` in seconds since 1970."""
        line = json.dumps({"row": row, "keep": keep, "reviewer": reviewer, "at": at})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        fsync(self._file.parent)

    def waiting(self, digest: str) -> list[Waiting]:
        """Undecided rows that the dataset's own `review` setting puts before a person: whoever is
        in them agreed to that. Raises NotFound.
        """
        manifest = manifest_of(self._registry, digest)
        asked = next(
            (str(rule.settings["review"]) for rule in manifest.rules if rule.rule == "reviewed"),
            "none",
        )
        decided = self.decisions()
        folder = self._registry.artifacts.path(digest)
        return [
            row
            for row in _rows(folder)
            if row.row not in decided and (asked == "all" or (asked == "masked" and row.masked))
        ]

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)


def review(
    reviews: Reviews,
    waiting: list[Waiting],
    ask: Callable[[Waiting], bool | None],
    reviewer: str,
    clock: Callable[[], float],
) -> int:
    """Put each row before `ask`, which says keep, drop or (None) stop; returns how many were
    decided.
    """
    for done, row in enumerate(waiting):
        keep = ask(row)
        if keep is None:
            return done
        reviews.decide(row.row, keep, reviewer, clock())
    return len(waiting)


def _rows(folder: Path) -> Iterator[Waiting]:
    """Each event once, though its prompt may be in several sets."""
    seen = set[str]()
    for name in SETS:
        for row in pq.read_table(folder / f"{name}.parquet").to_pylist():
            if row["id"] in seen:
                continue
            seen.add(row["id"])
            turns = [f"{m['role']}: {m['content']}" for m in row["messages"]]
            answers = row.get("responses") or [row["response"]] if name != "ppo" else []
            yield Waiting(
                row["id"],
                name,
                tuple(row["masked"]),
                row["text"] or "\n".join(turns),
                tuple(answers),
            )
