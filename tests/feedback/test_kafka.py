"""What Kafka adds to what every log does: its URL, outages, other clients, several nodes."""

import logging
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource

from contracts.errors import InvalidInput, LogUnavailable
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback.log import open_log
from feedback.log.address import KafkaAddress, KafkaSettings, client_config, parse
from feedback.log.kafka import KafkaLog
from tests.feedback.samples import completion, consent

pytestmark = pytest.mark.kafka


@pytest.fixture
def namespace() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def open_quick(url: str, timeout_s: float = 5.0) -> KafkaLog:
    return KafkaLog(parse(url), KafkaSettings(timeout_s=timeout_s))


def test_a_url_says_where_and_how() -> None:
    assert parse("kafka://a:1,b:2/prod") == KafkaAddress(("a:1", "b:2"), "prod")
    assert parse("kafka://[::1]:9092/x?security=sasl_ssl&partitions=12&replication=1") == (
        KafkaAddress(("[::1]:9092",), "x", "sasl_ssl", 12, 1)
    )


@pytest.mark.parametrize(
    "url",
    [
        *("kafka://", "kafka://host/x", "kafka://host:1", "kafka://host:1/", "kafka://host:1/a b"),
        *("kafka://host:1/x?retries=3", "kafka://host:1/x?security=none", "kafka:/host:1/x"),
        *("kafka://host:1/x?partitions=0", "kafka://host:1/x?replication=two", "kafka://:1/x"),
        *("sqlite:///", "sqlite://x", "log.sqlite", "sqlite:///a?b=c"),
    ],
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="log URL"):
        open_log(url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidInput, match=r"kafka://\*\*\*@host:1/x") as refused:
        open_log("kafka://ann:hunter2@host:1/x")
    assert "hunter2" not in str(refused.value)


def test_sasl_needs_a_user_and_shows_no_password() -> None:
    address = parse("kafka://host:1/x?security=sasl_ssl")
    with pytest.raises(InvalidInput, match="INSTRUCTLOOP_KAFKA_USERNAME"):
        client_config(address, KafkaSettings())
    settings = KafkaSettings.model_validate({"username": "ann", "password": "hunter2"})
    assert client_config(address, settings)["sasl_plain_password"] == "hunter2"
    assert "hunter2" not in repr(settings)


def test_topics_keep_everything_and_dead_letters_their_latest(
    kafka: Cluster, namespace: str
) -> None:
    log = open_quick(f"kafka://{kafka.bootstrap}/{namespace}?replication=1&partitions=3", 30)
    log.append([consent("ann")])
    assert log.partitions("consents") == 3
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    asked = [ConfigResource("TOPIC", f"{namespace}.{t}") for t in ("consents", "dead-letters")]
    found = admin.describe_configs(asked, config_filter="all")["topic"]
    admin.close()
    log.close()
    for name, policy in (("consents", "delete"), ("dead-letters", "compact")):
        settings = {k: v["value"] for k, v in found[f"{namespace}.{name}"].items()}
        assert settings["cleanup.policy"] == policy
        assert settings["retention.ms"] == settings["retention.bytes"] == "-1"
        assert settings["min.insync.replicas"] == "1"


def test_too_few_nodes_for_the_copies_that_were_asked_for(kafka: Cluster, namespace: str) -> None:
    log = open_quick(f"kafka://{kafka.bootstrap}/{namespace}?replication=3", 30)
    with pytest.raises(LogUnavailable, match="InvalidReplicationFactor"):
        log.ends("consents")
    log.close()


def test_a_person_is_where_another_client_puts_them(kafka: Cluster, namespace: str) -> None:
    log = open_quick(f"kafka://{kafka.bootstrap}/{namespace}?replication=1&partitions=7", 30)
    events = [consent(f"user-{i}") for i in range(50)]
    log.append(events)
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap)
    for event in events:
        key, value = event.user_id.encode(), consent(event.user_id).SerializeToString()
        producer.send(f"{namespace}.consents", key=key, value=value)
    producer.close()
    places = {(r.event.user_id, r.partition) for r in follow(log, "consents", {})}
    assert sum(log.ends("consents").values()) == 100
    assert len(places) == 50
    log.close()


def test_who_read_to_the_end_is_answered_at_once(kafka: Cluster, namespace: str) -> None:
    log = open_quick(f"kafka://{kafka.bootstrap}/{namespace}?replication=1&partitions=1", 30)
    log.append([consent(f"user-{i}") for i in range(100)])
    assert [len(log.read("consents", 0, offset, 60)) for offset in (0, 60)] == [60, 40]
    began = time.monotonic()
    assert log.ends("consents") == {0: 100}
    # By default a node holds the client's question for what comes next for half a second.
    assert time.monotonic() - began < 0.4
    log.close()


def test_kcat_reads_what_we_wrote(kafka: Cluster, namespace: str, kcat: str) -> None:
    log = open_quick(f"kafka://{kafka.bootstrap}/{namespace}?replication=1", 30)
    events = [completion("ann", f"cmpl-{i}", prompt=f"question {i}") for i in range(50)]
    log.append(events)
    log.close()
    said = subprocess.run(
        [
            kcat,
            "-C",
            "-e",
            "-q",
            "-b",
            kafka.bootstrap,
            "-t",
            f"{namespace}.completions",
            "-f",
            "%k %R%s",
        ],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    found = []
    while said:
        assert said[:4] == b"ann "
        size = int.from_bytes(said[4:8], "big")
        found.append(pb.Event.FromString(said[8 : 8 + size]))
        said = said[8 + size :]
    assert found == events


def test_an_outage_is_said_at_once_and_over_when_it_is_over(
    kafka_parts: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The node is frozen, then killed; in between and after it answers again."""
    cluster = Cluster(tmp_path).start()
    (node,) = cluster.nodes
    log = open_quick(f"kafka://{cluster.bootstrap}/outage?replication=1", 3.0)
    try:
        positions: dict[int, int] = {}
        events = [consent("ann", version=f"secret-{i}") for i in range(3)]
        with caplog.at_level(logging.DEBUG):
            wait_until_appended(log, events[0])
            for away, back, event in (
                (cluster.freeze, cluster.thaw, events[1]),
                (cluster.kill, cluster.restart, events[2]),
            ):
                away(node)
                with pytest.raises(LogUnavailable, match="instructloop doctor"):
                    log.append([event])
                began = time.monotonic()
                with pytest.raises(LogUnavailable):
                    list(follow(log, "consents", positions))
                assert time.monotonic() - began < 1.0  # nobody waits for what is known to be away
                back(node)
                wait_until_appended(log, event)
        found = [record.event for record in follow(log, "consents", {})]
        assert found == events
        assert "secret" not in caplog.text
    finally:
        log.close()
        cluster.stop()


def wait_until_appended(log: KafkaLog, event: pb.Event, bound_s: float = 60.0) -> None:
    deadline = time.monotonic() + bound_s
    while True:
        try:
            log.append([event])
            return
        except LogUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_a_leader_that_dies_takes_nothing_with_it(kafka_parts: None, tmp_path: Path) -> None:
    """Three nodes, three copies: one node after the other is killed while events come in."""
    cluster = Cluster(tmp_path, size=3).start()
    log = open_quick(f"kafka://{cluster.bootstrap}/three", 10.0)
    try:
        acknowledged = []
        for node in cluster.nodes:
            for turn in range(20):
                event = consent(f"user-{turn}")
                wait_until_appended(log, event)
                acknowledged.append(event.id)
                if turn == 5:
                    cluster.kill(node)
            cluster.restart(node)
        deadline = time.monotonic() + 60
        while True:
            try:
                found = [record.event.id for record in follow(log, "consents", {})]
                break
            except LogUnavailable:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert sorted(found) == sorted(acknowledged)
    finally:
        log.close()
        cluster.stop()
