"""ReplicaReporter: tells the registry, and who asks, what this server serves."""

import asyncio
import datetime as dt
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from contracts.release import ReleaseRegistry
from contracts.rollout import BEAT_S, Replica
from serving.gate import Gate
from serving.swap import WeightSwapper

log = logging.getLogger(__name__)

LOOK_S = 0.2


def own_name() -> str:
    """The host's name, which is the pod's in Kubernetes, and the process's number."""
    return f"{socket.gethostname()}-{os.getpid()}"


class ReplicaReporter:
    """Writes this replica's record when it changes and every few seconds."""

    def __init__(
        self,
        name: str,
        registry: ReleaseRegistry,
        swapper: WeightSwapper,
        gate: Gate,
        clock: Callable[[], float],
    ) -> None:
        self.name, self._registry, self._swapper, self._gate = name, registry, swapper, gate
        self._clock = clock
        # Set by an operator: not ready, so that a load balancer sends nothing more.
        self.draining = False

    def now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self._clock(), dt.UTC)

    def record(self) -> Replica:
        swapper = self._swapper
        serving, target = swapper.serving, swapper.target
        last = next((c for c in reversed(swapper.changes) if c.release == target), None)
        behind = last is not None and last.outcome not in ("swapped_in", "loaded")
        return Replica(
            name=self.name,
            at=self.now(),
            state=swapper.state,
            draining=self.draining,
            running=self._gate.running,
            serving=serving.id if serving else None,
            target=target,
            reason=last.reason if last is not None and behind else None,
        )

    async def run(self) -> None:
        """Until cancelled; then the record is taken away."""
        told = None
        try:
            while True:
                record = self.record()
                if told is None or _differ(record, told):
                    await _to_its_end(asyncio.to_thread(self._report, record))
                    told = record
                await asyncio.sleep(LOOK_S)
        finally:
            self._registry.rollout.remove(self.name)

    def _report(self, record: Replica) -> None:
        try:
            self._registry.rollout.report(record)
        except OSError as e:  # a registry that cannot be written to stops no answer
            log.warning("replica %s: its record could not be written: %s", self.name, e)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Cancelled or not: a record that a thread writes late would outlive this server."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        await task


def _differ(new: Replica, told: Replica) -> bool:
    """Whether it is worth a line: the number of running answers is not."""
    unchanged = new.model_copy(update={"at": told.at, "running": told.running}) == told
    return not unchanged or (new.at - told.at).total_seconds() >= BEAT_S
