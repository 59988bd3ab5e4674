"""The first words with a Kafka node, spoken without its client, so that each step can fail by name.

Wire format and codes: Kafka's protocol guide, https://kafka.apache.org/protocol; SCRAM: RFC 5802.
"""

import base64
import hashlib
import hmac
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from feedback.log.address import KafkaAddress, KafkaSettings

_API_VERSIONS, _SASL_HANDSHAKE, _SASL_AUTHENTICATE = 18, 17, 36
# What the client asks of a node, by its number in the protocol.
_NEEDED = {
    "Produce": 0,
    "Fetch": 1,
    "ListOffsets": 2,
    "Metadata": 3,
    "OffsetCommit": 8,
    "OffsetFetch": 9,
    "FindCoordinator": 10,
    "CreateTopics": 19,
    "DeleteRecords": 21,
    "InitProducerId": 22,
    "DescribeConfigs": 32,
}
_MECHANISM = "SCRAM-SHA-512"
_MAX_ANSWER = 1 << 20


class HandshakeFailed(Exception):
    """A step of the greeting did not succeed."""

    def __init__(self, step: str, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(f"{step}: {reason}")


class _Failed(Exception):
    """Why the step that is under way cannot succeed."""


@dataclass
class Connection:
    """An open connection to one node."""

    stream: socket.socket
    asked: int = 0

    def ask(self, api: int, version: int, body: bytes) -> bytes:
        """Send a request and return its answer, without headers. Raises _Failed."""
        self.asked += 1
        name = b"instructloop-doctor"
        header = struct.pack(">hhih", api, version, self.asked, len(name)) + name
        try:
            self.stream.sendall(struct.pack(">i", len(header + body)) + header + body)
            (size,) = struct.unpack(">i", self._take(4))
            if not 4 <= size <= _MAX_ANSWER:
                raise _Failed("the answer is not of Kafka's protocol")
            return self._take(size)[4:]
        except OSError as e:
            raise _Failed(f"no answer: {type(e).__name__}") from e

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (piece := self.stream.recv(count - len(data))):
                raise _Failed("the node closed the connection")
            data += piece
        return data


def greet(server: str, address: KafkaAddress, settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    """Every step that succeeds, with a word on it: TCP, TLS, versions, SASL. Raises HandshakeFailed
    at the first that does not, with its name.
    """
    step, streams = "TCP", ExitStack()
    with streams:
        try:
            plain = streams.enter_context(_connect(server, settings.timeout_s))
            yield step, "connected"
            connection = Connection(plain)
            if address.security != "plaintext":
                step = "TLS"
                secure, days = _encrypt(plain, server, settings.ca)
                streams.enter_context(secure)
                yield step, f"{secure.version()}; its certificate is good for {days} days"
                connection = Connection(secure)
            step = "versions"
            _check_versions(connection)
            yield step, "all that is needed"
            if address.security == "sasl_ssl":
                step = "SASL"
                _authenticate(connection, settings)
                yield step, f"authenticated as {settings.username}"
        except _Failed as e:
            raise HandshakeFailed(step, str(e)) from e
        except (struct.error, ValueError, KeyError) as e:
            raise HandshakeFailed(step, "the answer is not of Kafka's protocol") from e


def reach(address: KafkaAddress, settings: KafkaSettings) -> None:
    """Raises HandshakeFailed, of the last server, if none of them can be worked with."""
    failed: HandshakeFailed | None = None
    for server in address.servers:
        try:
            for _ in greet(server, address, settings):
                pass
            return
        except HandshakeFailed as e:
            failed = HandshakeFailed(f"{server} {e.step}", e.reason)
    assert failed is not None
    raise failed


def _connect(server: str, timeout_s: float) -> socket.socket:
    """TCP. Raises _Failed."""
    host, _, port = server.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    except OSError as e:
        raise _Failed(f"{type(e).__name__}: {e.strerror or e}") from e


def _encrypt(plain: socket.socket, server: str, ca: Path | None) -> tuple[ssl.SSLSocket, int]:
    """TLS, and the days for which the node's certificate is good. Raises _Failed."""
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except OSError as e:
        raise _Failed(f"INSTRUCTLOOP_KAFKA_CA: {ca} is no PEM file of certificates") from e
    try:
        stream = context.wrap_socket(plain, server_hostname=server.rpartition(":")[0].strip("[]"))
    except ssl.SSLCertVerificationError as e:
        raise _Failed(f"its certificate is not trusted: {e.verify_message}") from e
    except OSError as e:
        raise _Failed(f"the node does not speak TLS here ({type(e).__name__})") from e
    certificate = stream.getpeercert() or {}
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return stream, int((ends - time.time()) // 86400)


def _check_versions(connection: Connection) -> None:
    """Whether the node knows every request that we need. Raises _Failed."""
    answer = connection.ask(_API_VERSIONS, 0, b"")
    error, count = struct.unpack(">hi", answer[:6])
    if error:
        raise _Failed(f"error {error} of the protocol")
    known = {struct.unpack(">h", answer[6 + 6 * i : 8 + 6 * i])[0] for i in range(count)}
    if lacking := [name for name, api in _NEEDED.items() if api not in known]:
        raise _Failed(f"the node does not know {', '.join(lacking)}")


def _authenticate(connection: Connection, settings: KafkaSettings) -> None:
    """SASL with SCRAM-SHA-512, the node's proof included. Raises _Failed."""
    if settings.username is None or settings.password is None:
        raise _Failed("INSTRUCTLOOP_KAFKA_USERNAME and INSTRUCTLOOP_KAFKA_PASSWORD are not set")
    name = _MECHANISM.encode()
    answer = connection.ask(_SASL_HANDSHAKE, 1, struct.pack(">h", len(name)) + name)
    if struct.unpack(">h", answer[:2])[0]:
        raise _Failed(f"the node does not offer {_MECHANISM}")
    said = settings.username.replace("=", "=3D").replace(",", "=2C")
    first = f"n={said},r={secrets.token_hex(16)}"
    server_first = _say(connection, f"n,,{first}")
    fields = _fields(server_first)
    if not fields.get("r", "").startswith(first.rpartition("r=")[2]):
        raise _Failed("the node answered somebody else's question")
    password = settings.password.get_secret_value().encode()
    salted = hashlib.pbkdf2_hmac(
        "sha512", password, base64.b64decode(fields["s"]), int(fields["i"])
    )
    final = f"c=biws,r={fields['r']}"
    exchange = f"{first},{server_first},{final}".encode()
    client_key = _hmac(salted, b"Client Key")
    signature = _hmac(hashlib.sha512(client_key).digest(), exchange)
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    server_final = _say(connection, f"{final},p={base64.b64encode(proof).decode()}")
    expected = _hmac(_hmac(salted, b"Server Key"), exchange)
    if not hmac.compare_digest(base64.b64decode(_fields(server_final)["v"]), expected):
        raise _Failed("the node does not know the password itself")


def _say(connection: Connection, words: str) -> str:
    data = words.encode()
    answer = connection.ask(_SASL_AUTHENTICATE, 0, struct.pack(">i", len(data)) + data)
    error, length = struct.unpack(">hh", answer[:4])
    if error:
        reason = answer[4 : 4 + max(0, length)].decode(errors="replace")
        raise _Failed(reason or f"error {error} of the protocol")
    (size,) = struct.unpack(">i", answer[4 + max(0, length) : 8 + max(0, length)])
    return answer[8 + max(0, length) :][:size].decode()


def _fields(words: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words.split(","))


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, "sha512").digest()
