"""EventSink and EventSource: what offset, commit and replay mean.

- A topic has one or more partitions; an event goes to the partition of its `user_id`, so one
  person's events keep their order. Offsets in a partition grow; there may be gaps between them. An
  event never changes its offset, and no offset is used twice.
- `append` returns when the events are durable: neither kill -9 nor power loss takes them back.
- A topic shows an id once. Whoever is not sure that an append succeeded appends the same events
  again: a reader sees the first record of an id, at that record's offset, and no other.
- Reading may leave out records, as those whose person erased them; it gives nothing only at the
  partition's end.
- Reading takes nothing away. A reader keeps its own position: the offset of the next event that it
  wants. Replay is reading from 0 again.
- A consumer group's committed offset is the next offset that it wants after a restart; 0 if it
  never committed. Which reader of a group takes which partition is up to the readers.
- What cannot be read as an event of its topic is skipped by `read` and kept as a dead letter, with
  the reason. It is never dropped, and can be brought back once a reader understands it.
- A consent that cannot be read may be a withdrawal: until it is brought back, `read` shows a
  withdrawal of all purposes, by the person it was written for, in its place.
- Nothing leaves a log by itself: `expire` drops what is older than a time, from the start on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from contracts.v1 import events_pb2 as pb


class Record(NamedTuple):
    """An event and where it stands."""

    topic: str
    partition: int
    offset: int
    event: pb.Event


@dataclass(frozen=True)
class DeadLetter:
    """What stands at a place of the log and is no event of that topic; `value` is as it came."""

    topic: str
    partition: int
    offset: int
    reason: str
    value: bytes


class EventSink(Protocol):
    """Where producers write. Safe to call from several threads."""

    def append(self, events: Sequence[pb.Event]) -> None:
        """Write all of `events` durably, each to the topic of its body.

        Validates first: raises InvalidEvent and writes nothing if one of them is not valid. After
        any other error some of them may be in the log; append the same again.
        """
        ...


class EventSource(Protocol):
    """Where consumers read. Safe to call from several threads. Raises LogUnavailable."""

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has, at least 1."""
        ...

    def ends(self, topic: str) -> dict[int, int]:
        """Partition to its end: an offset above every event's, and not above any later event's."""
        ...

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        """Up to `limit` records from `offset` on, in order.

        Empty only if no event stands between `offset` and the partition's end.
        """
        ...

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Remember `offset` as the next one that `group` wants."""
        ...

    def committed(self, group: str, topic: str, partition: int) -> int:
        """The offset that `group` committed last; 0 if it never did."""
        ...


@runtime_checkable
class Local(Protocol):
    """A log on this machine, which can be looked at without waiting."""

    def ends_now(self, topic: str) -> dict[int, int]:
        """As `ends`. Raises BlockingIOError where that would take waiting."""
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
    """A log that can be written, read and kept in order."""

    def expire(self, topic: str, before: float) -> int:
        """Drop every record that was appended before `before`, in seconds since 1970; returns how
        many offsets that took.
        """
        ...

    def dead_letters(self) -> list[DeadLetter]:
        """What readers of the log could not read so far, and nobody brought back."""
        ...

    def revive(self, letter: DeadLetter) -> str | None:
        """Append the event that `letter.value` is by now, mended or understood; forget the letter.

        Returns the reason why it still is none, else None. Twice does no harm.
        """
        ...

    def close(self) -> None: ...


def follow(
    source: EventSource, topic: str, positions: dict[int, int], until: dict[int, int] | None = None
) -> Iterator[Record]:
    """Every record of `topic` from `positions` (partition to offset, else 0) to the end or `until`.

    Moves `positions` on as it goes, so that a fold can call it again for what is new.
    """
    for partition, end in (source.ends(topic) if until is None else until).items():
        while (offset := positions.get(partition, 0)) < end:
            records = source.read(topic, partition, offset, min(1000, end - offset))
            for record in records:
                if record.offset < end:
                    positions[partition] = record.offset + 1
                    yield record
            if not records or records[-1].offset >= end:
                positions[partition] = end


def end_offsets(source: EventSource, topics: Iterable[str]) -> dict[str, dict[int, int]]:
    """Topic to partition to end offset: a range that a dataset can name."""
    return {topic: source.ends(topic) for topic in topics}
