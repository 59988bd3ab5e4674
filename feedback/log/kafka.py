"""The log of several machines: Apache Kafka. The only file that imports its client.

Every append waits for acks=all from an idempotent producer. A topic may hold an event twice all the
same, when an append was repeated that had succeeded unseen: reading leaves the second one out.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource
from kafka.errors import (
    AuthorizationError,
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    KafkaError,
    NotCoordinatorError,
    RetriableError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import OffsetAndMetadata

from contracts.errors import InvalidInput, LogUnavailable
from contracts.events import topic_of
from contracts.log import DeadLetter, Record
from contracts.v1 import events_pb2 as pb
from feedback.log.address import KafkaAddress, KafkaSettings, client_config
from feedback.log.handshake import HandshakeFailed, reach
from feedback.log.seen import SeenIds
from feedback.log.topics import DEAD_LETTERS, TopicState, topic_settings
from feedback.log.wire import (
    MAX_BYTES,
    Poison,
    check_numbers,
    check_topic,
    decode,
    encode,
    withdrawal_for,
)

# The client prints a record's bytes at DEBUG, and a line a second while a broker is away.
logging.getLogger("kafka").setLevel(logging.CRITICAL)
log = logging.getLogger(__name__)

# Records that wait for their acknowledgement at a time: the client itself bounds no memory.
_IN_FLIGHT = 2000
# A cluster that is away is asked this often whether it is back.
_PROBE_S = 0.5
# Header of a dead letter that was brought back.
_REVIVED = "revived"


class KafkaLog:
    """contracts.log.Log on a cluster. Connects at the first call, not when it is made.

    While the cluster does not answer, every call fails at once; a thread asks until it is back.
    """

    def __init__(self, address: KafkaAddress, settings: KafkaSettings) -> None:
        self._address, self._settings, self._timeout_s = address, settings, settings.timeout_s
        self._config = client_config(address, settings)
        self._clients: dict[type, Any] = {}
        self._partitions: dict[str, int] = {}
        # What the consumer stands at: topic, partition, offset of the next record.
        self._at: tuple[str, int, int] | None = None
        self._seen = SeenIds()
        self._opening, self._reading, self._admin = (threading.RLock() for _ in range(3))
        self._away = threading.Event()
        self._closed = threading.Event()

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
        end = self._ends(topic)[partition]
        with self._reading, self._reach():
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
        with self._reading, self._reach():
            consumer, wait = self._client(KafkaConsumer), self._wait_ms()
            starts = consumer.beginning_offsets(places, timeout_ms=wait)
            ends = consumer.end_offsets(places, timeout_ms=wait)
            asked = dict.fromkeys(places, int(before * 1000))
            young = consumer.offsets_for_times(asked, timeout_ms=wait)
            first = {p: young[p].offset if young.get(p) else ends[p] for p in places}
        with self._admin, self._reach():
            self._client(KafkaAdminClient).delete_records(first, timeout_ms=wait)
        return int(sum(max(0, first[p] - starts[p]) for p in places))

    def dead_letters(self) -> list[DeadLetter]:
        return [letter for letter in self._letters().values() if letter is not None]

    def _letters(self) -> dict[bytes, DeadLetter | None]:
        """The latest word on each place: a letter, or None where it was brought back."""
        letters: dict[bytes, DeadLetter | None] = {}
        end, offset = self._ends(DEAD_LETTERS)[0], 0
        with self._reading, self._reach():
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
        self._closed.set()
        self._drop_clients()
        with self._reading:
            self._seen.close()

    def sender(self) -> "KafkaSender":
        """For a forwarder: a producer of its own that calls back. Raises LogUnavailable."""
        with self._reach():
            self._client(KafkaAdminClient)  # the topics are there from here on
            return KafkaSender(self._address, self._producer())

    # Writing.

    def _send(self, rows: Sequence[tuple[str, bytes, bytes | None]], headers: Any = None) -> None:
        """Topic, key, value; returns when all of them are acknowledged."""
        with self._reach():
            producer = self._client(KafkaProducer)
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
            ids = [(record.offset, record.event.id) for record in records]
            self._seen.add(topic, partition, ids, following)
        copies = self._seen.copies(topic, partition)
        return [r for r in records if r.offset not in copies] if copies else records, following

    def _raw(
        self, topic: str, partition: int, offset: int, end: int, limit: int
    ) -> tuple[list[Any], int]:
        """The next records before `end`, one at least if there is any, and the offset after."""
        consumer, place = self._client(KafkaConsumer), self._place(topic, partition)
        if consumer.assignment() != {place}:
            consumer.assign([place])
        if self._at != (topic, partition, offset):
            consumer.seek(place, offset)
        self._at = None
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            records = consumer.poll(timeout_ms=200, max_records=limit).get(place, [])
            following = consumer.position(place, timeout_ms=self._wait_ms())
            if records or following >= end:
                self._at = (topic, partition, following)
                return [r for r in records if r.offset < end], following
        raise _NoAnswer

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
        with self._reading, self._reach():
            consumer = self._client(KafkaConsumer)
            ends = consumer.end_offsets(places, timeout_ms=self._wait_ms())
        return {place.partition: ends[place] for place in places}

    def _count(self, topic: str) -> int:
        if topic not in self._partitions:
            with self._reading, self._reach():
                name = self._address.topic(topic)
                found = self._client(KafkaConsumer).partitions_for_topic(name)
                if not found:
                    raise _NoAnswer
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

    def _wait_ms(self) -> int:
        return int(self._timeout_s * 1000)

    def _coordinated(self, ask: Callable[[KafkaAdminClient], Any]) -> Any:
        """Ask a group's coordinator, which a cluster takes a moment to choose."""
        deadline = time.monotonic() + self._timeout_s
        with self._admin, self._reach():
            while True:
                try:
                    return ask(self._client(KafkaAdminClient))
                except (
                    CoordinatorNotAvailableError,
                    CoordinatorLoadInProgressError,
                    NotCoordinatorError,
                ):
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)

    # Clients: made at first use, thrown away at the first error.

    @contextmanager
    def _reach(self) -> Iterator[None]:
        """Around every word with the cluster: its errors become ours."""
        if self._away.is_set():
            raise LogUnavailable("Kafka does not answer; instructloop doctor says more")
        try:
            yield
        except AuthorizationError as e:
            raise _unavailable(e) from e
        except (KafkaError, HandshakeFailed) as e:
            self._drop_clients()
            if isinstance(e, RetriableError | HandshakeFailed) and not self._closed.is_set():
                self._watch()
            raise _unavailable(e) from e

    def _watch(self) -> None:
        with self._opening:
            if not self._away.is_set():
                self._away.set()
                threading.Thread(target=self._probe, name="kafka-probe", daemon=True).start()

    def _probe(self) -> None:
        while not self._closed.wait(_PROBE_S):
            with suppress(HandshakeFailed):
                reach(self._address, self._settings)
                self._away.clear()
                return

    def _client(self, kind: type) -> Any:
        with self._opening:
            if not self._clients:
                reach(self._address, self._settings)
                self._clients[KafkaAdminClient] = KafkaAdminClient(**self._config)
                self._create_topics(self._clients[KafkaAdminClient])
            if kind not in self._clients:
                made = {KafkaConsumer: self._consumer, KafkaProducer: self._producer}
                self._clients[kind] = made[kind]()
            return self._clients[kind]

    def _consumer(self) -> KafkaConsumer:
        return KafkaConsumer(
            **self._config,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            allow_auto_create_topics=False,
            max_partition_fetch_bytes=MAX_BYTES,
        )

    def _producer(self) -> KafkaProducer:
        # A batch fails before who waits for it gives up.
        return KafkaProducer(
            **self._config,
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            batch_size=128 << 10,
            allow_auto_create_topics=False,
            max_block_ms=self._wait_ms(),
            delivery_timeout_ms=2 * self._wait_ms(),
            max_request_size=2 * MAX_BYTES,
        )

    def _create_topics(self, admin: KafkaAdminClient) -> None:
        there = set(admin.list_topics())
        for topic, settings in topic_settings(self._address).items():
            if topic not in there:
                with suppress(TopicAlreadyExistsError):
                    admin.create_topics({topic: settings}, wait_for_metadata=True)

    def _drop_clients(self) -> None:
        with self._opening:
            clients, self._clients, self._at = self._clients, {}, None
        for kind, client in clients.items():
            with suppress(Exception):
                _abandon(client) if kind is KafkaProducer else client.close()


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
            _abandon(self._producer)


class _NoAnswer(RetriableError):  # type: ignore[misc]
    """The cluster is there, and what was asked for did not come."""


def _abandon(producer: KafkaProducer) -> None:
    """End a producer at once. Its own `close` waits for what is under way, raises when that does
    not come in time, and leaves the sending thread at work: its records could arrive much later.
    """
    producer._sender.force_close()
    producer._sender.join(2.0)
    producer.close(timeout=1)


def topic_states(address: KafkaAddress, settings: KafkaSettings) -> dict[str, TopicState | None]:
    """Every topic of ours by its full name; None where it is not there. Raises LogUnavailable."""
    names = list(topic_settings(address))
    try:
        reach(address, settings)
        with closing(KafkaAdminClient(**client_config(address, settings))) as admin:
            described = {t["name"]: t for t in admin.describe_topics(names)}
            asked = [ConfigResource("TOPIC", name) for name in names]
            configs = admin.describe_configs(asked, config_filter="all")["topic"]
    except (KafkaError, HandshakeFailed) as e:
        raise _unavailable(e) from e
    return {name: _state(described[name], configs.get(name, {})) for name in names}


def _state(topic: Mapping[str, Any], config: Mapping[str, Any]) -> TopicState | None:
    rows, unknown = topic["partitions"], UnknownTopicOrPartitionError.errno
    if topic["error_code"] == unknown:
        return None
    seen = topic["error_code"] != TopicAuthorizationFailedError.errno
    return TopicState(
        partitions=len(rows),
        replicas=min((len(row["replica_nodes"]) for row in rows), default=0),
        in_sync=min((len(row["isr_nodes"]) for row in rows), default=0),
        leaderless=sum(row["leader_id"] < 0 for row in rows),
        settings={name: entry["value"] for name, entry in config.items()},
        allowed=frozenset(topic["authorized_operations"] if seen else ()),
    )


def _unavailable(error: Exception) -> LogUnavailable:
    name = str(error) if isinstance(error, HandshakeFailed) else type(error).__name__.lstrip("_")
    return LogUnavailable(f"Kafka: {name}; instructloop doctor says more")


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
