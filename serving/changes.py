"""Changes: what was tried with releases, for who asks, and written to the log."""

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from contracts.errors import InstructloopError
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import ReleaseRegistry
from contracts.v1 import events_pb2 as pb

log = logging.getLogger(__name__)

Outcome = Literal["swapped_in", "loaded", "refused", "rolled_back"]
# Where the weights came from: the registry's disk, this server's own memory, or a trainer.
Source = Literal["disk", "memory", "tcp", "nccl"]

TRANSITION: dict[Outcome, pb.ReleaseTransition] = {
    "swapped_in": pb.RELEASE_TRANSITION_SWAPPED_IN,
    "loaded": pb.RELEASE_TRANSITION_LOADED,
    "refused": pb.RELEASE_TRANSITION_REFUSED,
    "rolled_back": pb.RELEASE_TRANSITION_ROLLED_BACK,
}


@dataclass(frozen=True)
class Change:
    """One attempt to serve another release, or to load one beside what is served. Times in
    milliseconds; 0 for a step that was not reached.
    """

    release: str
    outcome: Outcome
    source: Source
    reason: str | None
    at: str
    # From noticing the release until its weights lay ready beside the running ones.
    stage_ms: float
    # From closing the gate until the last running answer had left.
    drain_ms: float
    # From then until the gate was open again.
    pause_ms: float
    # Answers that still ran after the drain bound, and were ended.
    cut_short: int


class Timer:
    """Milliseconds of each step, 0 for one that was not reached, of an attempt with weights from
    `source`.
    """

    def __init__(self, clock: Callable[[], float], source: Source = "disk") -> None:
        self._clock, self.source = clock, source
        self.ms = {"stage_ms": 0.0, "drain_ms": 0.0, "pause_ms": 0.0}
        self.cut_short = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.ms[name] = round((self._clock() - began) * 1000, 3)


class Changes:
    """Of one server, since it started."""

    def __init__(self, registry: ReleaseRegistry, sink: EventSink, stamper: Stamper) -> None:
        self._registry, self._sink, self._stamper = registry, sink, stamper
        self.all: list[Change] = []

    async def note(
        self, release_id: str, outcome: Outcome, reason: str | None, timer: Timer
    ) -> None:
        at = dt.datetime.fromtimestamp(self._stamper.clock(), dt.UTC).isoformat()
        cut, source = timer.cut_short, timer.source
        self.all.append(Change(release_id, outcome, source, reason, at, **timer.ms, cut_short=cut))
        log.log(
            logging.INFO if outcome in ("swapped_in", "loaded") else logging.ERROR,
            "release %s %s (from %s, stage %.0f ms, drain %.0f ms, pause %.1f ms, %d cut short)%s",
            *(release_id, outcome, timer.source, *timer.ms.values(), timer.cut_short),
            f": {reason}" if reason else "",
        )
        try:
            await asyncio.to_thread(self._append, release_id, outcome, reason)
        except Exception:  # a slow or broken log never stops serving
            log.exception("release %s: the change could not be written to the log", release_id)

    def _append(self, release_id: str, outcome: Outcome, reason: str | None) -> None:
        try:
            release = self._registry.get(release_id)
        except (InstructloopError, OSError):  # refused for that very reason
            release = None
        body = pb.ReleaseChange(
            release_id=release_id,
            release_digest=release.artifact if release else "",
            transition=TRANSITION[outcome],
            reason=reason or "",
        )
        model = release.model if release else release_id
        self._sink.append([self._stamper.event(model, body)])
