import asyncio
import datetime as dt
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from contracts.release import ReleaseRegistry
from contracts.rollout import Replica, Rollout
from serving.replica import ReplicaReporter


class HeldRollout(Rollout):
    """A disk that takes its time."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.writes, self.go = threading.Event(), threading.Event()

    def report(self, replica: Replica) -> None:
        self.writes.set()
        self.go.wait(10)
        super().report(replica)


class LoadingReporter(ReplicaReporter):
    def record(self) -> Replica:
        return Replica(
            name=self.name,
            at=self.now(),
            state="loading",
            draining=False,
            running=0,
            serving=None,
            target=None,
        )


def test_record_that_is_written_while_the_server_ends_does_not_outlive_it(tmp_path: Path) -> None:
    registry, nothing = ReleaseRegistry(tmp_path), cast("Any", None)
    registry.rollout = held = HeldRollout(tmp_path)

    async def scene() -> None:
        reporter = LoadingReporter("a", registry, nothing, nothing, time.time)
        running = asyncio.create_task(reporter.run())
        assert await asyncio.to_thread(held.writes.wait, 10)
        running.cancel()
        asyncio.get_running_loop().call_later(0.05, held.go.set)
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(scene())
    assert registry.rollout.replicas(dt.datetime.now(dt.UTC)) == []
