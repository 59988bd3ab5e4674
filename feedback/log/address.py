"""Where a Kafka cluster is and how it is spoken to: a URL, and secrets from the environment."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from contracts.environment import FromEnvironment
from contracts.errors import InvalidInput

KAFKA = "kafka://"
EXPECTED = (
    "kafka://HOST:PORT[,HOST:PORT...]/NAMESPACE"
    "[?security=plaintext|ssl|sasl_ssl][&partitions=N][&replication=N], no user and no password"
)
_SERVER = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,200}")
_HAS_USER = re.compile(r"//[^/]*@")

Security = Literal["plaintext", "ssl", "sasl_ssl"]


class KafkaSettings(FromEnvironment):
    """What must not stand in a URL: INSTRUCTLOOP_KAFKA_<NAME> sets the field of that name."""

    model_config = SettingsConfigDict(
        env_prefix="INSTRUCTLOOP_KAFKA_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    # For SCRAM-SHA-512, where the URL says security=sasl_ssl.
    username: str | None = None
    password: SecretStr | None = None
    # Certificates to trust, as a PEM file; those of the system by default.
    ca: Path | None = None
    # How long a call waits for the cluster before it says that it does not answer, in seconds.
    timeout_s: float = Field(default=5.0, gt=0)


@dataclass(frozen=True)
class KafkaAddress:
    """A parsed URL. Topics are named NAMESPACE.TOPIC; `partitions` and `replication` are for the
    topics that are created.
    """

    servers: tuple[str, ...]
    namespace: str
    security: Security = "plaintext"
    partitions: int = 4
    replication: int = 3

    def topic(self, name: str) -> str:
        return f"{self.namespace}.{name}"


def parse(url: str) -> KafkaAddress:
    """Raises InvalidInput."""
    if _HAS_USER.search(url):
        raise InvalidInput("log URL", EXPECTED, _HAS_USER.sub("//***@", url))
    place, _, query = url.removeprefix(KAFKA).partition("?")
    listed, _, namespace = place.partition("/")
    servers = tuple(listed.split(","))
    if not all(map(_SERVER.fullmatch, servers)) or not _NAMESPACE.fullmatch(namespace):
        raise InvalidInput("log URL", EXPECTED, url)
    options = dict(parse_qsl(query, keep_blank_values=True))
    security = options.pop("security", "plaintext")
    if security not in ("plaintext", "ssl", "sasl_ssl"):
        raise InvalidInput("log URL, security", "plaintext, ssl or sasl_ssl", security)
    numbers = {n: _number(n, options.pop(n)) for n in ("partitions", "replication") if n in options}
    if options:
        raise InvalidInput("log URL", EXPECTED, url)
    return KafkaAddress(servers, namespace, security, **numbers)  # type: ignore[arg-type]


def client_config(address: KafkaAddress, settings: KafkaSettings) -> dict[str, Any]:
    """What every client of the library is made with."""
    wait_ms = int(settings.timeout_s * 1000)
    config: dict[str, Any] = {
        "bootstrap_servers": list(address.servers),
        "bootstrap_timeout_ms": wait_ms,
        "request_timeout_ms": wait_ms,
        "reconnect_backoff_max_ms": 1000,
        "security_protocol": address.security.upper(),
    }
    if settings.ca is not None:
        config["ssl_cafile"] = str(settings.ca)
    if address.security == "sasl_ssl":
        if settings.username is None or settings.password is None:
            raise InvalidInput(
                "INSTRUCTLOOP_KAFKA_USERNAME, INSTRUCTLOOP_KAFKA_PASSWORD",
                "both, for security=sasl_ssl",
                "nothing",
            )
        config |= {
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password.get_secret_value(),
        }
    return config


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InvalidInput(f"log URL, {name}", "a whole number from 1", text)
    return int(text)
