"""WeightSwapper: new release > verify > stage > drain > swap > check > open, or roll back."""

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import InstructloopError, InvalidInput, NotFound
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving import checkpoint
from serving.engine import Engine
from serving.gate import Gate

log = logging.getLogger(__name__)

Outcome = Literal["swapped_in", "refused", "rolled_back"]

TRANSITION: dict[Outcome, pb.ReleaseTransition] = {
    "swapped_in": pb.RELEASE_TRANSITION_SWAPPED_IN,
    "refused": pb.RELEASE_TRANSITION_REFUSED,
    "rolled_back": pb.RELEASE_TRANSITION_ROLLED_BACK,
}


@dataclass(frozen=True)
class Change:
    """One attempt to serve another release. Times in milliseconds; 0 for a step that was not
    reached.
    """

    release: str
    outcome: Outcome
    reason: str | None
    at: str
    # From noticing the release until its weights lay ready beside the running ones.
    stage_ms: float
    # From closing the gate until the last running answer had left.
    drain_ms: float
    # From then until the gate was open again.
    pause_ms: float


@dataclass(frozen=True)
class SwapOptions:
    """How the swapper watches and checks."""

    poll_s: float = 0.5
    drain_bound_s: float = 60.0
    # Largest difference of one log-probability, in nats.
    canary_tolerance: float = 0.01


class CanaryFailed(InstructloopError):
    """The engine computes something else than the trainer did."""


class EngineFailed(InstructloopError):
    """The engine is dead, or runs weights that nobody can vouch for: the process must end."""


class WeightSwapper:
    """Keeps the engine on the registry's current release."""

    def __init__(
        self,
        engine: Engine,
        registry: ReleaseRegistry,
        gate: Gate,
        sink: EventSink,
        stamper: Stamper,
        options: SwapOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._registry, self._gate = engine, registry, gate
        self._sink, self._stamper, self._options, self._clock = sink, stamper, options, clock
        # What every answer that is let through the gate now is made by; None while loading.
        self.serving: Release | None = None
        self.changes: list[Change] = []
        # The value of `current` that was dealt with last: a refused release is not tried again
        # until it changes.
        self._settled: str | None = None

    async def run(self) -> None:
        """Load the first release, then follow the registry. Ends only by EngineFailed or
        cancellation.
        """
        while True:
            if failure := self._engine.failure():
                raise EngineFailed(f"the engine has stopped: {failure}")
            await self.look()
            await asyncio.sleep(self._options.poll_s)

    async def look(self) -> None:
        """One look at the registry, and the swap that it asks for."""
        current = await asyncio.to_thread(self._registry.current_id)
        if current is None or current == self._settled:
            return
        if self.serving is None:
            await self._load_first()
        elif current != self.serving.id:
            await self._follow(current)
        else:
            self._settled = current

    async def _load_first(self) -> None:
        """Start the engine on the current release or, if that is damaged, on the last one before it
        that is not.
        """
        history = await asyncio.to_thread(self._registry.history)
        for release_id in dict.fromkeys(reversed(history)):
            timer = _Timer(self._clock)
            self._settled = self._settled or release_id
            try:
                release, folder = await asyncio.to_thread(self._verified, release_id)
            except Exception as e:  # noqa: BLE001  whatever is wrong with it, the one before may be right
                await self._note(release_id, "refused", str(e), timer)
                continue
            with timer.step("stage_ms"):
                await self._engine.start(folder, release.model)
                await self._check_canary(release.canary)
            self.serving = release
            await self._note(release_id, "swapped_in", None, timer)
            return
        raise EngineFailed("no release in the registry can be served")

    async def _follow(self, release_id: str) -> None:
        timer = _Timer(self._clock)
        try:
            with timer.step("stage_ms"):
                release, folder = await asyncio.to_thread(self._verified, release_id)
                await asyncio.to_thread(self._check_fits, release, folder)
                await self._engine.stage(folder)
        except Exception as e:  # noqa: BLE001  whatever is wrong with it, the running release goes on
            self._settled = release_id
            await self._note(release_id, "refused", str(e), timer)
            return
        try:
            await self._swap(release, timer)
        except TimeoutError:
            log.warning("swap to %s postponed: answers still run after the drain bound", release_id)
        finally:
            await self._engine.discard()

    async def _swap(self, release: Release, timer: "_Timer") -> None:
        """Raises TimeoutError, with nothing changed, when the running answers do not end within the
        bound.
        """
        async with AsyncExitStack() as gate_closed:
            with timer.step("drain_ms"):
                closing = self._gate.writing(self._options.drain_bound_s)
                await gate_closed.enter_async_context(closing)
            with timer.step("pause_ms"):
                reason = await self._exchange(release)
        self._settled = release.id
        await self._note(release.id, "rolled_back" if reason else "swapped_in", reason, timer)

    async def _exchange(self, release: Release) -> str | None:
        """Swap with the gate closed. None, or why the old weights are back. Raises EngineFailed."""
        old = self.serving
        assert old is not None
        try:
            reason = await self._exchange_weights(release.canary, old.canary)
        except Exception as e:
            self.serving = None
            raise EngineFailed(
                f"the engine's weights are in doubt after a swap to {release.id}: {e}"
            ) from e
        self.serving = old if reason else release
        return reason

    async def _exchange_weights(self, new: Canary, old: Canary) -> str | None:
        await self._engine.swap()
        try:
            await self._check_canary(new)
        except CanaryFailed as e:
            await self._engine.swap()
            await self._check_canary(old)
            return str(e)
        return None

    def _verified(self, release_id: str) -> tuple[Release, Path]:
        """The release and its folder, every byte read again. Raises NotFound or CorruptArtifact."""
        release = self._registry.get(release_id)
        self._registry.artifacts.verify(release.artifact)
        return release, self._registry.artifacts.path(release.artifact)

    def _check_fits(self, release: Release, folder: Path) -> None:
        assert self.serving is not None
        if release.model != self.serving.model:
            raise InvalidInput("release.model", self.serving.model, release.model)
        running = self._registry.artifacts.path(self.serving.artifact)
        checkpoint.check_interchangeable(running, folder)

    async def _check_canary(self, canary: Canary) -> None:
        """Raise CanaryFailed unless the engine gives the canary the log-probabilities that the
        trainer gave it.
        """
        got = await self._engine.logprobs(canary.token_ids)
        differences = [abs(a - b) for a, b in zip(got, canary.logprobs, strict=True)]
        tolerance = self._options.canary_tolerance
        wrong = [d for d in differences if not d <= tolerance]  # NaN is not <= anything
        if wrong:
            raise CanaryFailed(
                f"canary: expected the trainer's log-probabilities within {tolerance}, "
                f"got {len(wrong)} of {len(differences)} that differ more, one by {wrong[0]:.4g}"
            )

    async def _note(
        self, release_id: str, outcome: Outcome, reason: str | None, timer: "_Timer"
    ) -> None:
        """Keep the change for `GET /v1/releases`, and write it to the log."""
        at = dt.datetime.fromtimestamp(self._stamper.clock(), dt.UTC).isoformat()
        self.changes.append(Change(release_id, outcome, reason, at, **timer.ms))
        log.log(
            logging.INFO if outcome == "swapped_in" else logging.ERROR,
            "release %s %s (stage %.0f ms, drain %.0f ms, pause %.1f ms)%s",
            *(release_id, outcome, *timer.ms.values(), f": {reason}" if reason else ""),
        )
        try:
            await asyncio.to_thread(self._append, release_id, outcome, reason)
        except Exception:  # a slow or broken log never stops serving
            log.exception("release %s: the change could not be written to the log", release_id)

    def _append(self, release_id: str, outcome: Outcome, reason: str | None) -> None:
        try:
            release = self._registry.get(release_id)
        except (NotFound, ValueError):  # refused for that very reason
            release = None
        body = pb.ReleaseChange(
            release_id=release_id,
            release_digest=release.artifact if release else "",
            transition=TRANSITION[outcome],
            reason=reason or "",
        )
        model = release.model if release else release_id
        self._sink.append([self._stamper.event(model, body)])


class _Timer:
    """Milliseconds of each step, 0 for one that was not reached."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.ms = {"stage_ms": 0.0, "drain_ms": 0.0, "pause_ms": 0.0}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.ms[name] = round((self._clock() - began) * 1000, 3)
