"""The clients of a Kafka cluster: made at first use, thrown away at the first error."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    RetriableError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from kafka.partitioner import Partitioner
from kafka.partitioner.default import murmur2

from contracts.errors import LogUnavailable
from feedback.log.address import KafkaAddress, KafkaSettings, client_config
from feedback.log.handshake import HandshakeFailed, reach
from feedback.log.topics import TopicState, topic_settings
from feedback.log.wire import MAX_BYTES

# The client prints a record's bytes at DEBUG, and a line a second while a broker is away.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

# A cluster that is away is asked this often whether it is back.
_PROBE_S = 0.5
# How long a node may hold an answer that has no record in it. A reader asks for what is there; what
# it asks next, of the same node, waits behind that.
_HOLD_MS = 10


class NoAnswer(RetriableError):  # type: ignore[misc]
    """The cluster is there, and what was asked for did not come."""


class Cluster:
    """One client of each kind, from any thread.

    While the cluster does not answer, every use fails at once; a thread asks until it is back.
    """

    def __init__(self, address: KafkaAddress, settings: KafkaSettings) -> None:
        self._address, self._settings = address, settings
        self._config = client_config(address, settings)
        self._clients: dict[type, Any] = {}
        self._opening = threading.RLock()
        self._away, self._closed = threading.Event(), threading.Event()

    @property
    def wait_ms(self) -> int:
        return int(self._settings.timeout_s * 1000)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Around every word with the cluster: its errors become ours."""
        if self._away.is_set():
            raise LogUnavailable("Kafka does not answer; instructloop doctor says more")
        try:
            yield
        except AuthorizationError as e:
            raise _unavailable(e) from e
        except (KafkaError, HandshakeFailed) as e:
            self._drop()
            if isinstance(e, RetriableError | HandshakeFailed) and not self._closed.is_set():
                self._watch()
            raise _unavailable(e) from e

    def close(self) -> None:
        self._closed.set()
        self._drop()

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

    def client(self, kind: type) -> Any:
        """Whoever has an admin client or a producer has the topics, too; a consumer may not."""
        with self._opening:
            if not self._clients:
                reach(self._address, self._settings)
            if kind is not KafkaConsumer and KafkaAdminClient not in self._clients:
                self._clients[KafkaAdminClient] = KafkaAdminClient(**self._config)
                self._create_topics(self._clients[KafkaAdminClient])
            if kind not in self._clients:
                made = {KafkaConsumer: self._consumer, KafkaProducer: self.producer}
                self._clients[kind] = made[kind]()
            return self._clients[kind]

    def _consumer(self) -> KafkaConsumer:
        return KafkaConsumer(
            **self._config,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            allow_auto_create_topics=False,
            fetch_max_wait_ms=_HOLD_MS,
            # A reader of a whole log waits an eighth as often as with the client's own bound.
            max_partition_fetch_bytes=MAX_BYTES,
            metrics_enabled=False,
        )

    def producer(self) -> KafkaProducer:
        # A batch fails before who waits for it gives up.
        return KafkaProducer(
            **self._config,
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            batch_size=128 << 10,
            allow_auto_create_topics=False,
            max_block_ms=self.wait_ms,
            delivery_timeout_ms=2 * self.wait_ms,
            max_request_size=2 * MAX_BYTES,
            partitioner=ByKey(),
            metrics_enabled=False,
        )

    def _create_topics(self, admin: KafkaAdminClient) -> None:
        there = set(admin.list_topics())
        for topic, settings in topic_settings(self._address).items():
            if topic not in there:
                with suppress(TopicAlreadyExistsError):
                    admin.create_topics({topic: settings}, wait_for_metadata=True)

    def _drop(self) -> None:
        with self._opening:
            clients, self._clients = self._clients, {}
        for kind, client in clients.items():
            with suppress(Exception):
                abandon(client) if kind is KafkaProducer else client.close()


class ByKey(Partitioner):  # type: ignore[misc]
    """Puts a key where the client's own partitioner does, and works that out once for many events
    of a person.
    """

    def partition(
        self,
        topic: str,
        key: bytes,
        serialized_key: bytes,
        value: Any,
        serialized_value: Any,
        cluster: Any,
    ) -> int:
        return _partition_of(serialized_key, len(cluster.partitions_for_topic(topic)))


@lru_cache(maxsize=10_000)
def _partition_of(key: bytes, partitions: int) -> int:
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


def abandon(producer: KafkaProducer) -> None:
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
