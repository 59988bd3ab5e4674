"""SpooledLog: a log that may be away, with a spool before it: writing never waits for the log."""

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from contracts.errors import LogUnavailable
from contracts.log import DeadLetter, Log, Record
from contracts.v1 import events_pb2 as pb
from feedback.log.forwarder import Forwarder, Sender
from feedback.log.spool import Spool, SpoolSettings

# Longer than an event takes from spool to log while the log is there.
_CATCH_UP_S = 2.0


@runtime_checkable
class RemoteLog(Log, Protocol):
    """A log elsewhere, and a sender to it that does not wait."""

    def sender(self) -> Sender: ...


class SpooledLog:
    """contracts.log.Log over one on other machines. What is appended is durable in the spool, and
    then in the log; who reads it in this process waits for that.

    Raises LogUnavailable where a read cannot know what is in the log, and SpoolFull on append.
    """

    def __init__(self, log: RemoteLog, spool: Spool) -> None:
        self._log, self.spool = log, spool
        self.forwarder = Forwarder(spool, log.sender)
        self.forwarder.start()

    def append(self, events: Sequence[pb.Event]) -> None:
        self.spool.append(events)

    def partitions(self, topic: str) -> int:
        return self._log.partitions(topic)

    def ends(self, topic: str) -> dict[int, int]:
        self._catch_up(topic)
        return self._log.ends(topic)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        return self._log.read(topic, partition, offset, limit)

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        self._log.commit(group, topic, partition, offset)

    def committed(self, group: str, topic: str, partition: int) -> int:
        return self._log.committed(group, topic, partition)

    def expire(self, topic: str, before: float) -> int:
        return self._log.expire(topic, before)

    def dead_letters(self) -> list[DeadLetter]:
        return self._log.dead_letters()

    def revive(self, letter: DeadLetter) -> str | None:
        return self._log.revive(letter)

    def close(self) -> None:
        """Forward what can be forwarded in a few seconds; the rest waits on disk."""
        self.forwarder.stop()
        self._log.close()
        self.spool.close()

    def _catch_up(self, topic: str) -> None:
        """Until the log has what this process has appended to the topic so far."""
        mark, deadline = self.spool.last(), time.monotonic() + _CATCH_UP_S
        while self.spool.depth(topic):
            oldest = self.spool.oldest()
            if oldest is None or oldest > mark:
                return
            if self.forwarder.trouble or time.monotonic() > deadline:
                raise LogUnavailable("events still wait in the spool; instructloop doctor says why")
            time.sleep(0.005)


def with_spool(log: Log, settings: SpoolSettings) -> Log:
    """`log` itself where it is a file of this machine, else with a spool before it."""
    if not isinstance(log, RemoteLog):
        return log
    return SpooledLog(log, Spool(settings.path, settings.max_bytes))
