"""The log of several machines: Apache Kafka. This file and cluster.py import its client.

Every append waits for acks=all from an idempotent producer. A topic may hold an event twice all the
same, when an append was repeated that had succeeded unseen: reading leaves the second one out.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    NotCoordinatorError,
)
from kafka.structs import OffsetAndMetadata

from contracts.errors import InvalidInput
from contracts.events import topic_of
from contracts.log import DeadLetter, Record
from contracts.v1 import events_pb2 as pb
from feedback.log.address import KafkaAddress, KafkaSettings
from feedback.log.cluster import Cluster, NoAnswer, abandon
from feedback.log.seen import SeenIds
from feedback.log.topics import DEAD_LETTERS
from feedback.log.wire import (
    Poison,
    check_numbers,
    check_topic,
    decode,
    encode,
    withdrawal_for,
)

log = logging.getLogger(__name__)

# Records that wait for their acknowledgement at a time: the client itself bounds no memory.
_IN_FLIGHT = 2000
# Header of a dead letter that was brought back.
_REVIVED = "revived"


class KafkaLog:
    """contracts.log.Log on a cluster. Connects at the first call, not when it is made.

    While the cluster does not answer, every call fails at once.
    """

    def __init__(self, address: KafkaAddress, settings: KafkaSettings) -> None:
        self._address, self._timeout_s = address, settings.timeout_s
        self._cluster = Cluster(address, settings)
        self._partitions: dict[str, int] = {}
        # Topic to the ends that were seen last. A partition only grows.
        self._seen_ends: dict[str, dict[int, int]] = {}
        # Which consumer stands where: topic, partition, offset of the next record.
        self._at: tuple[KafkaConsumer, str, int, int] | None = None
        self._seen = SeenIds()
        self._reading, self._admin = threading.RLock(), threading.RLock()

    def append(self, events: Sequence[pb.Event]) -> None:
        rows = [(topic_of(e), e.user_id.encode(), value) for e in events if (value := encode(e))]
        for start in range(0, len(rows), _IN_FLIGHT):
            self._send(rows[start : start + _IN_FLIGHT])

    def partitions(self, topic: str) -> int:
        check_topic(topic)
        return self._count(topic)

    def ends(self, topic: str) -> dict[int, int]:
        check_topic(topic)
        return self._ends(topic)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        self._check(topic, partition)
        check_numbers(offset=offset, limit=limit)
        end = self._seen_ends.get(topic, {}).get(partition, 0)
        if offset + limit > end:
            end = self._ends(topic)[partition]
        with self._reading, self._cluster.reached():
            while (known := self._seen.known(topic, partition)) < min(offset, end):
                self._good(topic, partition, known, end, _IN_FLIGHT)
            while limit and offset < end:
                records, offset = self._good(topic, partition, offset, end, limit)
                if records:
                    return records
        return []

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        self._check(topic, partition)
        check_numbers(offset=offset)
        name, place = self._group(group), self._place(topic, partition)

        def alter(admin: KafkaAdminClient) -> None:
            done = admin.alter_group_offsets(name, {place: OffsetAndMetadata(offset, "", -1)})
            if (error := done[place]).errno:
                raise error(name)

        self._coordinated(alter)

    def committed(self, group: str, topic: str, partition: int) -> int:
        self._check(topic, partition)
        name, place = self._group(group), self._place(topic, partition)
        known = self._coordinated(lambda admin: admin.list_group_offsets({name: [place]}))
        found = known.get(name, {}).get(place)
        return max(0, int(found.offset)) if found else 0

    def expire(self, topic: str, before: float) -> int:
        check_topic(topic)
        places = [self._place(topic, partition) for partition in range(self._count(topic))]
        with self._reading, self._cluster.reached():
            consumer, wait = self._cluster.client(KafkaConsumer), self._cluster.wait_ms
            starts = consumer.beginning_offsets(places, timeout_ms=wait)
            ends = consumer.end_offsets(places, timeout_ms=wait)
            asked = dict.fromkeys(places, int(before * 1000))
            young = consumer.offsets_for_times(asked, timeout_ms=wait)
            first = {p: young[p].offset if young.get(p) else ends[p] for p in places}
        with self._admin, self._cluster.reached():
            self._cluster.client(KafkaAdminClient).delete_records(first, timeout_ms=wait)
        return int(sum(max(0, first[p] - starts[p]) for p in places))

    def dead_letters(self) -> list[DeadLetter]:
        return [letter for letter in self._letters().values() if letter is not None]

    def _letters(self) -> dict[bytes, DeadLetter | None]:
        """The latest word on each place: a letter, or None where it was brought back."""
        letters: dict[bytes, DeadLetter | None] = {}
        end, offset = self._ends(DEAD_LETTERS)[0], 0
        with self._reading, self._cluster.reached():
            while offset < end:
                raw, offset = self._raw(DEAD_LETTERS, 0, offset, end, _IN_FLIGHT)
                for record in raw:
                    letters[record.key] = _letter(record)
        return letters

    def revive(self, letter: DeadLetter) -> str | None:
        try:
            event = decode(letter.topic, letter.value)
        except Poison as e:
            return str(e)
        self.append([event])
        # Not a tombstone, which compaction would drop: its bytes still stand in the topic.
        self._send([(DEAD_LETTERS, _letter_key(letter), b"")], [(_REVIVED, b"")])
        return None

    def close(self) -> None:
        self._cluster.close()
        with self._reading:
            self._seen.close()

    def sender(self) -> "KafkaSender":
        """For a forwarder: a producer of its own that calls back. Raises LogUnavailable."""
        with self._cluster.reached():
            self._cluster.client(KafkaAdminClient)  # the topics are there from here on
            return KafkaSender(self._address, self._cluster.producer())

    # Writing.

    def _send(self, rows: Sequence[tuple[str, bytes, bytes | None]], headers: Any = None) -> None:
        """Topic, key, value; returns when all of them are acknowledged."""
        with self._cluster.reached():
            producer = self._cluster.client(KafkaProducer)
            waiting = [
                producer.send(self._address.topic(topic), key=key, value=value, headers=headers)
                for topic, key, value in rows
            ]
            deadline = time.monotonic() + self._timeout_s
            for future in waiting:
                future.get(max(0.001, deadline - time.monotonic()))

    # Reading, under the lock of the one consumer.

    def _good(
        self, topic: str, partition: int, offset: int, end: int, limit: int
    ) -> tuple[list[Record], int]:
        """The events among the next records, and the offset after those."""
        raw, following = self._raw(topic, partition, offset, end, limit)
        records, poison = [], list[tuple[Any, DeadLetter]]()
        for at in raw:
            try:
                records.append(Record(topic, partition, at.offset, decode(topic, at.value)))
            except Poison as e:
                letter = DeadLetter(topic, partition, at.offset, str(e), at.value or b"")
                poison.append((at, letter))
        if poison:
            records = sorted([*records, *self._put_aside(poison)], key=lambda r: r.offset)
        if following > self._seen.known(topic, partition):
            self._seen.add(topic, partition, records, following)
        copies = self._seen.copies(topic, partition)
        return [r for r in records if r.offset not in copies] if copies else records, following

    def _raw(
        self, topic: str, partition: int, offset: int, end: int, limit: int
    ) -> tuple[list[Any], int]:
        """The next records before `end`, one at least if there is any, and the offset after."""
        consumer, place = self._cluster.client(KafkaConsumer), self._place(topic, partition)
        if consumer.assignment() != {place}:
            consumer.assign([place])
        if self._at != (consumer, topic, partition, offset):
            consumer.seek(place, offset)
        self._at = None
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            records = consumer.poll(timeout_ms=200, max_records=limit).get(place, [])
            following = consumer.position(place, timeout_ms=self._cluster.wait_ms)
            if records or following >= end:
                self._at = (consumer, topic, partition, following)
                return [r for r in records if r.offset < end], following
        self._seen_ends.pop(topic, None)
        raise NoAnswer

    def _put_aside(self, poison: Sequence[tuple[Any, DeadLetter]]) -> Iterator[Record]:
        """Bury what nobody brought back; give what counts in its place, if anything does."""
        known = self._letters()
        for at, letter in poison:
            if known.get(key := _letter_key(letter), letter) is None:
                continue
            if key not in known:
                self._bury(letter)
            user = (at.key or b"").decode(errors="replace")
            place = (letter.partition, letter.offset)
            counts = withdrawal_for(letter.topic, place, user, at.timestamp / 1000)
            if counts is not None:
                yield Record(letter.topic, *place, counts)

    def _bury(self, letter: DeadLetter) -> None:
        """Keep it before it is skipped; in a compacted topic, so that it is kept once."""
        log.error(
            "dead letter: %s, partition %d, offset %d: %s",
            *(letter.topic, letter.partition, letter.offset, letter.reason),
        )
        self._send(
            [(DEAD_LETTERS, _letter_key(letter), letter.value)],
            [("reason", letter.reason.encode())],
        )

    def _ends(self, topic: str) -> dict[int, int]:
        places = [self._place(topic, partition) for partition in range(self._count(topic))]
        with self._reading, self._cluster.reached():
            consumer = self._cluster.client(KafkaConsumer)
            ends = consumer.end_offsets(places, timeout_ms=self._cluster.wait_ms)
        self._seen_ends[topic] = {place.partition: ends[place] for place in places}
        return dict(self._seen_ends[topic])

    def _count(self, topic: str) -> int:
        if topic not in self._partitions:
            with self._reading, self._cluster.reached():
                name, consumer = self._address.topic(topic), self._cluster.client(KafkaConsumer)
                found = consumer.partitions_for_topic(name)
                if not found:
                    self._cluster.client(KafkaAdminClient)  # makes the topics
                    found = consumer.partitions_for_topic(name)
                if not found:
                    raise NoAnswer
                self._partitions[topic] = len(found)
        return self._partitions[topic]

    def _check(self, topic: str, partition: int) -> None:
        check_topic(topic)
        if not 0 <= partition < self._count(topic):
            raise InvalidInput("partition", f"0 to {self._count(topic) - 1}", partition)

    def _place(self, topic: str, partition: int) -> TopicPartition:
        return TopicPartition(self._address.topic(topic), partition)

    def _group(self, group: str) -> str:
        return self._address.topic(group)

    def _coordinated(self, ask: Callable[[KafkaAdminClient], Any]) -> Any:
        """Ask a group's coordinator, which a cluster takes a moment to choose."""
        deadline = time.monotonic() + self._timeout_s
        with self._admin, self._cluster.reached():
            while True:
                try:
                    return ask(self._cluster.client(KafkaAdminClient))
                except (
                    CoordinatorNotAvailableError,
                    CoordinatorLoadInProgressError,
                    NotCoordinatorError,
                ):
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)


class KafkaSender:
    """feedback.log.forwarder.Sender; says on the client's thread what was acknowledged."""

    def __init__(self, address: KafkaAddress, producer: KafkaProducer) -> None:
        self._address, self._producer = address, producer

    def send(
        self, topic: str, key: bytes, value: bytes, done: Callable[[Exception | None], None]
    ) -> None:
        """Does not wait, but for the topic's partitions the first time; buffers without bound."""
        sent = self._producer.send(self._address.topic(topic), key=key, value=value)
        sent.add_callback(lambda _: done(None))
        sent.add_errback(done)

    def close(self) -> None:
        """At once; what was not acknowledged may have arrived."""
        with suppress(Exception):
            abandon(self._producer)


def _letter_key(letter: DeadLetter) -> bytes:
    return f"{letter.topic}/{letter.partition}/{letter.offset}".encode()


def _letter(record: Any) -> DeadLetter | None:
    """None where it was brought back; so says a tombstone of an earlier version, too."""
    headers = dict(record.headers)
    if record.value is None or _REVIVED in headers:
        return None
    topic, partition, offset = record.key.decode().rsplit("/", 2)
    reason = headers["reason"].decode()
    return DeadLetter(topic, int(partition), int(offset), reason, record.value)
