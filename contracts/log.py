"""EventSink and EventSource: what offset, commit and replay mean.

- A topic has one or more partitions; an event goes to the partition of its `user_id`, so one
  person's events keep their order. Offsets in a partition start at 0 and grow by one; an event
  never changes its offset.
- `append` returns when the events are durable: neither kill -9 nor power loss takes them back.
  Appending an event whose id the topic already holds is a no-op, so a retry never counts twice.
- Reading may leave out records, as those whose person erased them; it gives nothing only at the
  partition's end.
- Reading takes nothing away. A reader keeps its own position: the offset of the next event that it
  wants. Replay is reading from 0 again.
- A consumer group's committed offset is the next offset that it wants after a restart; 0 if it
  never committed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from contracts.v1 import events_pb2 as pb


@dataclass(frozen=True)
class Record:
    """An event and where it stands."""

    topic: str
    partition: int
    offset: int
    event: pb.Event


class EventSink(Protocol):
    """Where producers write. Safe to call from several threads."""

    def append(self, events: Sequence[pb.Event]) -> None:
        """Write all of `events`, each to the topic of its body, durably and all or nothing.

        Validates first: raises InvalidEvent and writes nothing if one of them is not valid.
        """
        ...


class EventSource(Protocol):
    """Where consumers read. Safe to call from several threads."""

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has, at least 1."""
        ...

    def end_offset(self, topic: str, partition: int) -> int:
        """The offset that the next appended event will get."""
        ...

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """Up to `limit` records from `offset` on, in order; fewer at the partition's end."""
        ...

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Remember `offset` as the next one that `group` wants."""
        ...

    def committed(self, group: str, topic: str, partition: int) -> int:
        """The offset that `group` committed last; 0 if it never did."""
        ...


@runtime_checkable
class Erasing(Protocol):
    """A log whose bytes can be made to leave it."""

    def erase(self, user_id: str) -> int:
        """Take all that the person wrote or read out of the log's files, and keep the events'
        envelopes; returns how many events that were.
        """
        ...


class Log(EventSink, EventSource, Protocol):
    """A log that can be written and read, as the embedded one."""

    def close(self) -> None: ...


def follow(
    source: EventSource, topic: str, positions: dict[int, int], until: dict[int, int] | None = None
) -> Iterator[Record]:
    """Every record of `topic` from `positions` (partition to offset, else 0) to the end or `until`.

    Moves `positions` on as it goes, so that a fold can call it again for what is new.
    """
    for partition in range(source.partitions(topic)):
        end = source.end_offset(topic, partition) if until is None else until.get(partition, 0)
        while (offset := positions.get(partition, 0)) < end:
            records = source.read(topic, partition, offset, min(1000, end - offset))
            if not records:
                break
            for record in records:
                if record.offset >= end:
                    break
                positions[partition] = record.offset + 1
                yield record
            else:
                continue
            break


def end_offsets(source: EventSource, topics: Iterable[str]) -> dict[str, dict[int, int]]:
    """Topic to partition to end offset: a range that a dataset can name."""
    return {t: {p: source.end_offset(t, p) for p in range(source.partitions(t))} for t in topics}
