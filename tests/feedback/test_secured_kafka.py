"""TLS, SCRAM and ACLs of a real broker; what `instructloop doctor` says when one is wrong."""

import datetime as dt
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    ResourcePattern,
    ResourceType,
    UserScramCredentialUpsertion,
)
from pydantic import SecretStr
from typer.testing import CliRunner

from contracts.errors import LogUnavailable
from contracts.log import follow
from demo.broker import Cluster, Tls
from feedback.log.address import KafkaSettings, parse
from feedback.log.doctor import Finding, examine
from feedback.log.embedded import EmbeddedLog
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool, SpoolSettings
from instructloop.cli import app
from tests.feedback.log_backends import Kafka
from tests.feedback.samples import consent

pytestmark = pytest.mark.kafka

PASSWORD = "correct horse, battery = staple"


@dataclass(frozen=True)
class Secured:
    """A cluster, a user of it, and the authority that made its certificate."""

    cluster: Cluster
    ca: Path

    def url(self, namespace: str) -> str:
        servers = self.cluster.secure_bootstrap
        return f"kafka://{servers}/{namespace}?security=sasl_ssl&replication=1"

    def settings(self, password: str = PASSWORD, ca: Path | None = None) -> KafkaSettings:
        return KafkaSettings(
            username="serving", password=SecretStr(password), ca=ca or self.ca, timeout_s=10
        )


def authority(folder: Path, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(name, name, key, key, ca=True)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / f"{name}.pem").write_bytes(pem)
    return certificate, key


def _certificate(
    subject: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    signed_by: ec.EllipticCurvePrivateKey,
    ca: bool,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signed_by, hashes.SHA256())
    )


@pytest.fixture(scope="module")
def secured(kafka_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured-kafka")
    _, root_key = authority(folder, "root")
    authority(folder, "stranger")
    key = ec.generate_private_key(ec.SECP256R1())
    node = _certificate("localhost", "root", key, root_key, ca=False)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pem = node.public_bytes(serialization.Encoding.PEM)
    (folder / "node.pem").write_bytes(private + pem)
    cluster = Cluster(folder, tls=Tls(folder / "node.pem", folder / "root.pem"))
    try:
        cluster.start()
        admin = KafkaAdminClient(bootstrap_servers=cluster.bootstrap)
        admin.alter_user_scram_credentials(
            [UserScramCredentialUpsertion("serving", "SCRAM-SHA-512", PASSWORD)]
        )
        admin.create_acls(
            [
                _allow(ResourceType.TOPIC, "mine."),
                _allow(ResourceType.GROUP, "mine."),
            ]
        )
        admin.close()
        yield Secured(cluster, folder / "root.pem")
    finally:
        cluster.stop()


def _allow(kind: ResourceType, prefix: str) -> ACL:
    return ACL(
        principal="User:serving",
        host="*",
        operation=ACLOperation.ALL,
        permission_type=ACLPermissionType.ALLOW,
        resource_pattern=ResourcePattern(kind, prefix, ACLResourcePatternType.PREFIXED),
    )


def problems(url: str, settings: KafkaSettings) -> list[tuple[str, str]]:
    spool = SpoolSettings(path=Path("there/is/none.db"))
    return [(f.what, f.detail) for f in examine(url, settings, spool) if not f.ok]


def test_an_event_goes_through_tls_scram_and_acls(secured: Secured) -> None:
    url = secured.url("mine.a")
    log = KafkaLog(parse(url), secured.settings())
    event = consent("ann")
    log.append([event])
    assert [record.event for record in follow(log, "consents", {})] == [event]
    log.commit("builder", "consents", 0, 1)
    assert log.committed("builder", "consents", 0) == 1
    log.close()
    findings = list(examine(url, secured.settings(), SpoolSettings(path=Path("none.db"))))
    assert [f for f in findings if not f.ok] == []
    server = secured.cluster.secure_bootstrap
    assert [f.what for f in findings[:4]] == [
        f"{server} {step}" for step in ("TCP", "TLS", "versions", "SASL")
    ]
    assert "its certificate is good for 1 days" in findings[1].detail


def test_a_wrong_password_is_said_as_such_and_not_repeated(secured: Secured) -> None:
    settings = secured.settings(password="guess")
    ((what, detail),) = problems(secured.url("mine.a"), settings)
    assert what == f"{secured.cluster.secure_bootstrap} SASL"
    assert "invalid credentials" in detail and "guess" not in detail
    log = KafkaLog(parse(secured.url("mine.a")), settings)
    with pytest.raises(LogUnavailable, match=r"SASL: .*invalid credentials"):
        log.append([consent("ann")])
    log.close()


def test_a_strangers_certificate_is_said_as_such(secured: Secured) -> None:
    settings = secured.settings(ca=secured.ca.with_name("stranger.pem"))
    ((what, detail),) = problems(secured.url("mine.a"), settings)
    assert what == f"{secured.cluster.secure_bootstrap} TLS"
    assert "certificate is not trusted" in detail
    log = KafkaLog(parse(secured.url("mine.a")), settings)
    with pytest.raises(LogUnavailable, match="TLS: its certificate is not trusted"):
        log.append([consent("ann")])
    log.close()


def test_the_wrong_port_and_no_port_are_told_apart(secured: Secured) -> None:
    plain = secured.cluster.bootstrap
    ((what, detail),) = problems(f"kafka://{plain}/mine.a?security=ssl", secured.settings())
    assert (what, "TLS here" in detail) == (f"{plain} TLS", True)
    secure = secured.cluster.secure_bootstrap
    ((what, _),) = problems(f"kafka://{secure}/mine.a", secured.settings())
    assert what == f"{secure} versions"
    ((what, detail),) = problems("kafka://127.0.0.1:1/mine.a", secured.settings())
    assert (what, "refused" in detail) == ("127.0.0.1:1 TCP", True)


def test_what_the_acls_do_not_allow_is_named(secured: Secured) -> None:
    owner = KafkaLog(
        parse(f"kafka://{secured.cluster.bootstrap}/theirs?replication=1"), secured.settings()
    )
    owner.append([consent("ann")])
    owner.close()
    found = dict(problems(secured.url("theirs"), secured.settings()))
    assert "DESCRIBE is not allowed" in found["topic theirs.consents"]
    log = KafkaLog(parse(secured.url("theirs")), secured.settings())
    with pytest.raises(LogUnavailable):
        log.append([consent("ann")])
    log.close()


def test_topics_that_would_lose_events_are_named(secured: Secured) -> None:
    url = f"kafka://{secured.cluster.bootstrap}/mine.b?replication=1"
    settings, spool = secured.settings(), SpoolSettings(path=Path("none.db"))
    before = list(examine(url, settings, spool))
    assert all(finding.ok for finding in before)  # it changes nothing: the topics are not made
    assert "topic mine.b.consents: made at first use" in [f"{f.what}: {f.detail}" for f in before]
    log = KafkaLog(parse(url), settings)
    log.append([consent("ann")])
    log.close()
    admin = KafkaAdminClient(bootstrap_servers=secured.cluster.bootstrap)
    week = {"retention.ms": "604800000", "max.message.bytes": "1000000"}
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, "mine.b.consents", week)])
    admin.close()
    found = dict(problems(url.replace("replication=1", "replication=3"), settings))
    assert "retention.ms is 604800000" in found["topic mine.b.consents"]
    assert "max.message.bytes is 1000000" in found["topic mine.b.consents"]
    assert "1 copies, where the URL says 3" in found["topic mine.b.rankings"]


def test_the_command_line_shows_letters_brings_them_back_and_drops_what_is_old(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "30")
    monkeypatch.chdir(tmp_path)
    backend = Kafka(secured.cluster.bootstrap, f"mine.{uuid.uuid4().hex[:8]}")
    log = backend.open()
    log.append([consent("ann")])
    backend.plant("consents", "ann", b"\xffsecret")
    assert len(list(follow(log, "consents", {}))) == 2  # one counts as a withdrawal
    run = CliRunner().invoke
    listed = run(app, ["log", "letters", "--log", backend.url])
    assert "1 not an Event in protobuf's wire format" in listed.output
    assert "secret" not in listed.output
    doctor = run(app, ["doctor", "--log", backend.url])
    assert doctor.exit_code == 1
    assert "FAILED dead letters: 1; instructloop log letters lists them" in doctor.output
    revived = run(app, ["log", "revive", "--log", backend.url])
    assert (revived.exit_code, "0 came back, 1 stay" in revived.output) == (1, True)
    (letter,) = log.dead_letters()
    assert log.revive(type(letter)(**{**vars(letter), "value": _bytes()})) is None
    assert run(app, ["doctor", "--log", backend.url]).exit_code == 0
    expired = run(app, ["log", "expire", "consents", "--days", "0", "--log", backend.url])
    assert "3 dropped from consents" in expired.output
    assert list(follow(log, "consents", {})) == []
    log.close()


def _bytes() -> bytes:
    return consent("bob").SerializeToString()


def test_a_file_is_examined_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    (missing,) = examine(url, KafkaSettings(), SpoolSettings())
    assert not missing.ok and not (tmp_path / "log.db").exists()
    EmbeddedLog(tmp_path / "log.db").close()
    found = list(examine(f"sqlite:///{tmp_path}/log.db", KafkaSettings(), SpoolSettings()))
    assert found == [
        Finding("file", True, f"{tmp_path}/log.db: ok"),
        Finding("journal", True, "wal, of wal"),
        Finding("dead letters", True, "0"),
    ]
    (tmp_path / "log.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    result = CliRunner().invoke(app, ["doctor", "--log", f"sqlite:///{tmp_path}/log.db"])
    assert result.exit_code == 1


def test_what_waits_in_a_spool_in_use_is_seen(secured: Secured, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", 4 << 20)
    spool.append([consent("ann")])
    settings = SpoolSettings(path=spool.path, max_bytes=4 << 20)
    url = f"kafka://{secured.cluster.bootstrap}/mine.c?replication=1"
    last = list(examine(url, secured.settings(), settings))[-1]
    assert last.ok and "1 events wait" in last.detail
    spool.close()
