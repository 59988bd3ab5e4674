"""A real Kafka of one's own on this machine: KRaft nodes from jars in .kafka, for a try and tests.

`python -m demo.broker [PORT]` runs one node until Ctrl-C; its data is below .kafka/data.
"""

import argparse
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
JARS = ROOT / ".kafka" / "jars"
CLASSES = ROOT / ".kafka" / "classes.jsa"
START_BOUND_S = 60.0

# Small and quick: a broker of a test holds megabytes and lives for seconds.
_JVM = ("-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", "-Xlog:disable")
_SETTINGS = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    # A node that was killed is let back in after its session: 2 s in place of 9.
    "broker.session.timeout.ms": 2000,
    "broker.heartbeat.interval.ms": 500,
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "group.initial.rebalance.delay.ms": 0,
    "num.network.threads": 2,
    "num.io.threads": 4,
    "log.cleaner.dedupe.buffer.size": 4 << 20,
}
_PROTOCOLS = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL"
_LEVEL = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"


@dataclass(frozen=True)
class Tls:
    """A node's key with its certificate, and the authority that made it, as PEM files."""

    key_and_certificate: Path
    authority: Path


@dataclass
class Node:
    """One process, broker and controller at once."""

    number: int
    folder: Path
    port: int
    controller: int
    secure: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@dataclass
class Cluster:
    """`size` nodes below `folder`. With `tls` each has a second listener, of TLS and SCRAM-SHA-512,
    and ACLs hold there; who comes without TLS may do everything.
    """

    folder: Path
    size: int = 1
    tls: Tls | None = None
    port: int | None = None
    settings: dict[str, object] = field(default_factory=dict)
    java: tuple[str, ...] = (f"-XX:SharedArchiveFile={CLASSES}",)
    nodes: list[Node] = field(default_factory=list)

    def start(self) -> "Cluster":
        """Start every node and return when all of them answer."""
        for number in range(1, self.size + 1):
            first = self.port if self.port and number == 1 else _free_port()
            folder = self.folder / f"node-{number}"
            self.nodes.append(Node(number, folder, first, _free_port(), _free_port()))
        for node in self.nodes:
            self._prepare(node)
            self.launch(node)
        for node in self.nodes:
            self.wait_for(node)
        return self

    @property
    def bootstrap(self) -> str:
        return ",".join(node.address for node in self.nodes)

    @property
    def secure_bootstrap(self) -> str:
        return ",".join(f"localhost:{node.secure}" for node in self.nodes)

    def launch(self, node: Node) -> None:
        """Start the node's process; it is not ready when this returns."""
        if not list(JARS.glob("kafka_2.13-*.jar")):
            raise FileNotFoundError(f"no Kafka in {JARS}: run make kafkajars")
        with (node.folder / "node.log").open("ab") as log:
            node.process = subprocess.Popen(
                [
                    *("java", *_JVM, *self.java, _LEVEL, "-cp", f"{JARS}/*", "kafka.Kafka"),
                    str(node.folder / "server.properties"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, node: Node) -> None:
        """Until the node takes connections: a broker listens when it has joined the cluster."""
        deadline = time.monotonic() + START_BOUND_S
        while time.monotonic() < deadline:
            assert node.process is not None
            if node.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", node.port)) == 0:
                    return
            time.sleep(0.05)
        said = (node.folder / "node.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"Kafka node {node.number} did not start:\n{said}")

    def kill(self, node: Node) -> None:
        """kill -9."""
        self._signal(node, signal.SIGKILL)
        assert node.process is not None
        node.process.wait(30)

    def restart(self, node: Node) -> None:
        self.launch(node)
        self.wait_for(node)

    def freeze(self, node: Node) -> None:
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: Node) -> None:
        self._signal(node, signal.SIGCONT)

    def stop(self, bound_s: float = 10.0) -> None:
        """End every node, gently where it goes quickly."""
        running = [n for n in self.nodes if n.process is not None and n.process.poll() is None]
        for node in running:
            self._signal(node, signal.SIGCONT)
            self._signal(node, signal.SIGTERM)
        deadline = time.monotonic() + bound_s
        for node in running:
            assert node.process is not None
            try:
                node.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill(node)

    def _signal(self, node: Node, number: signal.Signals) -> None:
        assert node.process is not None
        node.process.send_signal(number)

    def _prepare(self, node: Node) -> None:
        """The node's settings, and the file that `kafka-storage format` would write."""
        data = node.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        properties = self._properties(node) | {"log.dirs": data}
        _write(node.folder / "server.properties", properties)
        if not (data / "meta.properties").exists():
            _write(
                data / "meta.properties",
                {
                    "version": 1,
                    "cluster.id": _short_id(uuid.uuid5(uuid.NAMESPACE_URL, str(self.folder))),
                    "node.id": node.number,
                    "directory.id": _short_id(uuid.uuid4()),
                },
            )

    def _properties(self, node: Node) -> dict[str, object]:
        copies = min(3, self.size)
        listeners = [f"PLAINTEXT://{node.address}", f"CONTROLLER://127.0.0.1:{node.controller}"]
        settings = _SETTINGS | {
            "node.id": node.number,
            "controller.quorum.voters": ",".join(
                f"{n.number}@127.0.0.1:{n.controller}" for n in self.nodes
            ),
            "listener.security.protocol.map": _PROTOCOLS,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": max(1, copies - 1),
        }
        if self.tls is not None:
            listeners.append(f"SECURE://localhost:{node.secure}")
            settings |= _secured(self.tls)
        return settings | {"listeners": ",".join(listeners)} | self.settings


def _secured(tls: Tls) -> dict[str, object]:
    return {
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.secure.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": tls.key_and_certificate,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": tls.authority,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }


def _write(path: Path, properties: dict[str, object]) -> None:
    path.write_text("".join(f"{k}={v}\n" for k, v in properties.items()), encoding="utf-8")


def _short_id(value: uuid.UUID) -> str:
    """Kafka's spelling of a UUID."""
    return urlsafe_b64encode(value.bytes).rstrip(b"=").decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def archive_classes() -> None:
    """Let a node write down the classes that it loaded: later ones start in half the time."""
    with tempfile.TemporaryDirectory() as folder:
        aside = CLASSES.with_suffix(".new")
        cluster = Cluster(Path(folder), java=(f"-XX:ArchiveClassesAtExit={aside}",)).start()
        cluster.stop(bound_s=60)
        aside.replace(CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", nargs="?", type=int, default=9092)
    parser.add_argument("--archive", action="store_true", help="only prepare quick starts")
    asked = parser.parse_args()
    if asked.archive:
        archive_classes()
    else:
        run(asked.port)


def run(port: int) -> None:
    """One node until Ctrl-C or SIGTERM."""
    began = time.monotonic()
    cluster = Cluster(ROOT / ".kafka" / "data", port=port).start()
    print(f"Kafka after {time.monotonic() - began:.1f} s; Ctrl-C ends it")
    print(f"INSTRUCTLOOP_LOG=kafka://{cluster.bootstrap}/instructloop?replication=1")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        assert cluster.nodes[0].process is not None
        cluster.nodes[0].process.wait()
    except KeyboardInterrupt:
        print("ending it")
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
