"""What a cluster's topics must be like: as we make them, and as we find them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contracts.events import TOPICS
from feedback.log.address import KafkaAddress
from feedback.log.wire import MAX_BYTES

DEAD_LETTERS = "dead-letters"
_NO_LIMIT = {"retention.ms": "-1", "retention.bytes": "-1"}


@dataclass(frozen=True)
class TopicState:
    """A topic as the cluster describes it, and what this user may do with it."""

    partitions: int
    replicas: int
    in_sync: int
    leaderless: int
    settings: Mapping[str, str]
    allowed: frozenset[str]

    def problems(self, address: KafkaAddress) -> list[str]:
        """What would lose events, or stop them; the reason of each."""
        needed = ("DESCRIBE", "READ", "WRITE")
        found = [f"{name} is not allowed" for name in needed if name not in self.allowed]
        if self.leaderless:
            found.append(f"{self.leaderless} of {self.partitions} partitions have no leader")
        if self.in_sync < self.replicas:
            found.append(f"a partition has {self.in_sync} of {self.replicas} copies in sync")
        if self.replicas < address.replication:
            found.append(f"{self.replicas} copies, where the URL says {address.replication}")
        for name, wanted in _NO_LIMIT.items():
            if (value := self.settings.get(name, wanted)) != wanted:
                found.append(f"{name} is {value}: the cluster drops events by itself")
        if int(self.settings.get("max.message.bytes", MAX_BYTES)) < MAX_BYTES:
            found.append(
                f"max.message.bytes is {self.settings['max.message.bytes']}, below {MAX_BYTES}"
            )
        return found


def topic_settings(address: KafkaAddress) -> dict[str, dict[str, Any]]:
    """What the topics are created with: nothing leaves them by itself."""
    shared = {
        "replication_factor": address.replication,
        "configs": _NO_LIMIT
        | {
            "cleanup.policy": "delete",
            "min.insync.replicas": str(max(1, address.replication - 1)),
            "max.message.bytes": str(MAX_BYTES + (64 << 10)),
            "message.timestamp.type": "LogAppendTime",
        },
    }
    dead = shared | {"num_partitions": 1}
    dead["configs"] = dead["configs"] | {"cleanup.policy": "compact"}  # type: ignore[operator]
    return {
        **{address.topic(t): shared | {"num_partitions": address.partitions} for t in TOPICS},
        address.topic(DEAD_LETTERS): dead,
    }
