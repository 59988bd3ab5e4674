"""Opens the log that a URL names."""

from pathlib import Path

from contracts.errors import InvalidInput
from contracts.log import Log
from feedback.log.address import EXPECTED, KAFKA, KafkaSettings, parse
from feedback.log.embedded import EmbeddedLog

SQLITE = "sqlite:///"


def open_log(url: str) -> Log:
    """The log at `url`, created if absent.

    `sqlite:///relative/path` or `sqlite:////absolute/path` is a file of this machine, and
    `kafka://HOST:PORT/NAMESPACE` a cluster. Raises InvalidInput.
    """
    if url.startswith(KAFKA):
        from feedback.log.kafka import KafkaLog

        return KafkaLog(parse(url), KafkaSettings())
    path = url.removeprefix(SQLITE)
    if path == url or not path or any(mark in path for mark in "?#"):
        raise InvalidInput("log URL", f"sqlite:///PATH, or {EXPECTED}", url)
    return EmbeddedLog(Path(path))
