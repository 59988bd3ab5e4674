"""Looks for what must not be kept: every event, and every byte of every file that a run wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from contracts.log import EventSource, follow
from demo.people import Person

CHUNK = 1 << 20


@dataclass(frozen=True)
class Leaks:
    """`leaked_events` counts events, files and dataset rows that hold what they must not."""

    leaked_events: int
    markers_searched: int
    bytes_searched: int
    found_in: tuple[str, ...]


def search(folder: Path, source: EventSource, people: Sequence[Person]) -> Leaks:
    """Search log, files below `folder` and datasets for the people who did not agree, or took it
    back.

    Who never agreed must be nowhere; who withdrew stays in the log as before the withdrawal, but in
    no dataset.
    """
    never = [p for p in people if p.production or not p.opted_in]
    withdrawn = [p for p in people if p.withdraws]
    found = [
        f"{topic}: event of {user}"
        for topic, user in _events_of(source, {p.user_id for p in never})
    ]
    searched = 0
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        searched += file.stat().st_size
        found += [
            f"{file}: marker of {p.user_id}" for p in never if _holds(file, p.marker.encode())
        ]
        if file.suffix == ".parquet":
            text = _decoded(file)
            found += [
                f"{file}: row of {p.user_id}" for p in [*never, *withdrawn] if p.marker in text
            ]
    return Leaks(len(found), len(never) + len(withdrawn), searched, tuple(found))


def _events_of(source: EventSource, users: set[str]) -> Iterable[tuple[str, str]]:
    for topic in ("completions", "rankings", "demonstrations"):
        for record in follow(source, topic, {}):
            if record.event.user_id in users:
                yield topic, record.event.user_id


def _holds(file: Path, marker: bytes) -> bool:
    """Whether the file's bytes hold `marker`, read in pieces that overlap."""
    tail = b""
    with file.open("rb") as f:
        while piece := f.read(CHUNK):
            if marker in tail + piece:
                return True
            tail = piece[-len(marker) :]
    return False


def _decoded(file: Path) -> str:
    """All of a Parquet file's values as text: its bytes are compressed and hide what they hold."""
    return str(pq.read_table(file).to_pylist())
