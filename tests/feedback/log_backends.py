"""The logs that the behaviour suite runs on, and how each gets a record that is no event."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kafka import KafkaProducer

from contracts.log import Log
from feedback.log import open_log
from feedback.log.embedded import EmbeddedLog


class Backend(Protocol):
    """One log, and ways into it that its interface does not have."""

    @property
    def url(self) -> str: ...

    def open(self) -> Log:
        """Opens the same log again, as another process would."""
        ...

    def plant(self, topic: str, user: str, value: bytes) -> None:
        """Puts bytes behind the last record, as a producer that is broken or newer would."""
        ...


@dataclass(frozen=True)
class Embedded:
    file: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.file}"

    def open(self) -> Log:
        return open_log(self.url)

    def plant(self, topic: str, user: str, value: bytes) -> None:
        log = EmbeddedLog(self.file)
        end = log.ends(topic)[0]
        log.close()
        with sqlite3.connect(self.file) as db:
            row = (topic, 0, end, f"planted-{end}", value, 0.0, user)
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        db.close()


@dataclass(frozen=True)
class Kafka:
    bootstrap: str
    namespace: str

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}/{self.namespace}?replication=1"

    def open(self) -> Log:
        return open_log(self.url)

    def plant(self, topic: str, user: str, value: bytes) -> None:
        log = self.open()
        log.ends(topic)  # the topic is there
        log.close()
        producer = KafkaProducer(bootstrap_servers=self.bootstrap)
        producer.send(f"{self.namespace}.{topic}", key=user.encode(), value=value).get(10)
        producer.close()
