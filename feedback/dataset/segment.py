"""Segments: a log cut into ranges of offsets, and the outlines of those that are full, kept from
one build to the next.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self, runtime_checkable

import msgspec

from contracts.log import EventSource, Record, follow
from contracts.release import ReleaseRegistry
from feedback import pii
from feedback.dataset import outline
from feedback.dataset.engine import Engine
from feedback.dataset.outline import Outline

EVENTS = 10_000


class Segment(NamedTuple):
    """Offsets `start` to `end`, exclusive, of a partition."""

    topic: str
    partition: int
    start: int
    end: int


@runtime_checkable
class Erasures(Protocol):
    """A source that knows who erased their texts."""

    def erasures(self) -> Mapping[str, float]:
        """User id to the time of the last erasure, in seconds since 1970."""
        ...


def cut(topic: str, ends: Mapping[int, int], events: int = EVENTS) -> list[Segment]:
    """The partitions of a topic up to their ends, in ranges of so many offsets."""
    return [
        Segment(topic, partition, start, min(start + events, end))
        for partition, end in sorted(ends.items())
        for start in range(0, end, events)
    ]


def records_of(source: EventSource, segment: Segment) -> Iterator[Record]:
    topic, partition, start, end = segment
    return follow(source, topic, {partition: start}, {partition: end})


def read(source: EventSource, task: tuple[Segment, int]) -> bytes:
    """The outlines of a segment, as bytes; `task` says how long a prompt's beginning is."""
    segment, prefix_chars = task
    return outline.encode(outline.outlines_of(records_of(source, segment), prefix_chars))


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    # Who had erased what when the segment was read.
    erasures: dict[str, float]
    outlines: bytes


class Outlines:
    """Reads segments with an engine, and keeps what it read below `folder`, if there is one.

    What is kept holds ids, counts and digests, and no text. It is for one code version and one log:
    a segment goes by its place, its first event's id and its length. It is read anew where a person
    in it erased their texts since; a withdrawal is a consent, which every build reads.
    """

    def __init__(self, folder: Path | None = None, events: int = EVENTS) -> None:
        self._folder, self._events = folder, events

    @classmethod
    def below(cls, registry: ReleaseRegistry, events: int = EVENTS) -> Self:
        """Those of a registry's datasets."""
        return cls(registry.root / "outlines", events)

    def read(
        self,
        source: EventSource,
        engine: Engine,
        topic: str,
        ends: Mapping[int, int],
        prefix_chars: int,
        code_version: str,
    ) -> Iterator[tuple[int, tuple[Outline, ...]]]:
        """(partition, outlines) of every segment of the topic, in order."""
        segments = cut(topic, ends, self._events)
        erasures = dict(source.erasures()) if isinstance(source, Erasures) else {}
        files = [self._file(source, s, prefix_chars, code_version) for s in segments]
        kept = [None if file is None else _load(file, erasures) for file in files]
        fresh = engine.map(
            read, [(s, prefix_chars) for s, k in zip(segments, kept, strict=True) if k is None]
        )
        for segment, file, known in zip(segments, files, kept, strict=True):
            if known is not None:
                yield segment.partition, known
                continue
            value = next(fresh)
            if file is not None:
                _save(file, _Kept(erasures, value))
            yield segment.partition, outline.decode(value)

    def forget(self, user_id: str) -> None:
        """Delete every segment that names the person."""
        name = user_id.encode()
        for file in self._folder.glob("*.outlines") if self._folder else ():
            if name in file.read_bytes():
                file.unlink(missing_ok=True)

    def _file(
        self, source: EventSource, segment: Segment, prefix_chars: int, code_version: str
    ) -> Path | None:
        """Where a full segment is kept; None for one that may still grow."""
        if self._folder is None or segment.end - segment.start < self._events:
            return None
        first = source.read(segment.topic, segment.partition, segment.start, 1)
        id = first[0].event.id if first else ""
        said = json.dumps([*segment, id, prefix_chars, pii.VERSION, code_version])
        return self._folder / f"{hashlib.sha256(said.encode()).hexdigest()}.outlines"


def _load(file: Path, erasures: Mapping[str, float]) -> tuple[Outline, ...] | None:
    try:
        kept = msgspec.msgpack.decode(file.read_bytes(), type=_Kept)
        outlines = outline.decode(kept.outlines)
    except (FileNotFoundError, msgspec.DecodeError):  # cut off by a power failure: read again
        return None
    since = {user for user, at in erasures.items() if kept.erasures.get(user) != at}
    return None if since and _names(outlines, since) else outlines


def _names(outlines: Sequence[Outline], users: set[str]) -> bool:
    return any(
        (o.rater if isinstance(o, outline.Ranked) else o.owner).user_id in users for o in outlines
    )


def _save(file: Path, kept: _Kept) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    aside.write_bytes(msgspec.msgpack.encode(kept))
    aside.replace(file)
