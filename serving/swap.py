"""WeightSwapper: new release > verify > stage > drain > swap > check > open, or roll back."""

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from contracts.errors import InstructloopError, InvalidInput
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving import checkpoint
from serving.engine import CacheKept, Engine
from serving.gate import Gate

log = logging.getLogger(__name__)

Outcome = Literal["swapped_in", "refused", "rolled_back"]
State = Literal["loading", "serving", "staging", "waiting", "swapping"]

TRANSITION: dict[Outcome, pb.ReleaseTransition] = {
    "swapped_in": pb.RELEASE_TRANSITION_SWAPPED_IN,
    "refused": pb.RELEASE_TRANSITION_REFUSED,
    "rolled_back": pb.RELEASE_TRANSITION_ROLLED_BACK,
}

POLICY = "policy"


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
    # Answers that still ran after the drain bound, and were ended.
    cut_short: int


@dataclass(frozen=True)
class SwapOptions:
    """How the swapper watches and checks."""

    poll_s: float = 0.5
    drain_bound_s: float = 60.0
    # Largest difference of one log-probability, in nats.
    canary_tolerance: float = 0.01
    # Whether the weights that were served before stay in memory, so that a rollback reads nothing.
    keep_previous: bool = True
    # With the gate closed, an engine that does not answer for so long is given up.
    exchange_bound_s: float = 60.0


class CanaryFailed(InstructloopError):
    """The engine computes something else than the trainer did."""


class EngineFailed(InstructloopError):
    """The engine is dead, or runs weights that nobody can vouch for: the process must end."""


class WeightSwapper:
    """Keeps the engine on the release that the registry wants served."""

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
        # The one before it, whose weights are still in memory.
        self.standby: Release | None = None
        # What the registry wanted when it was read last.
        self.target: str | None = None
        self.state: State = "loading"
        self.changes: list[Change] = []
        # The target that was dealt with last: a refused release is not tried again until the target
        # changes, or somebody asks for it.
        self._settled: str | None = None
        self._looking = asyncio.Lock()
        self._failure: EngineFailed | None = None

    async def run(self) -> None:
        """Load the first release, then follow the registry. Ends only by EngineFailed or
        cancellation.
        """
        tasks = [asyncio.create_task(loop) for loop in (self._watch(), self._follow_registry())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if not isinstance(end, asyncio.CancelledError | None):
                raise end

    async def look(self, *, again: bool = False) -> None:
        """One look at the registry, and the swap that it asks for; with `again` even to a release
        that was refused.
        """
        async with self._looking:
            if self._failure is not None:
                raise self._failure
            try:
                await self._look(again)
            except EngineFailed as e:  # whoever looked, `run` ends by it
                self._failure = e
                raise

    async def _look(self, again: bool) -> None:
        self.target = await asyncio.to_thread(self._registry.target_id)
        if self.target is None or (self.target == self._settled and not again):
            return
        if self.serving is None:
            await self._load_first()
        elif self.target != self.serving.id:
            await self._follow(self.target)
        else:
            self._settled = self.target

    async def _watch(self) -> None:
        """An engine may die while a swap waits for it."""
        while (failure := self._engine.failure()) is None:
            if self._failure is not None:
                raise self._failure
            await asyncio.sleep(self._options.poll_s)
        raise EngineFailed(f"the engine has stopped: {failure}")

    async def _follow_registry(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._options.poll_s)

    async def _load_first(self) -> None:
        """Start the engine on the wanted release or, if that is bad, on the last one before it that
        is not.
        """
        history = await asyncio.to_thread(self._registry.history)
        for release_id in dict.fromkeys(reversed(history)):
            timer = _Timer(self._clock)
            self._settled = self._settled or release_id
            try:
                with timer.step("stage_ms"):
                    self.serving = await self._start(release_id)
            except Exception as e:  # noqa: BLE001  whatever is wrong with it, the one before may be right
                await self._engine.stop()
                await self._note(release_id, "refused", str(e), timer)
                continue
            self.state = "serving"
            await self._note(release_id, "swapped_in", None, timer)
            return
        raise EngineFailed("no release in the registry can be served")

    async def _start(self, release_id: str) -> Release:
        release, folder = await asyncio.to_thread(self._verified, release_id)
        await asyncio.to_thread(_check_alone, folder)
        await self._engine.start(folder, release.model)
        await self._check_canary(release.canary)
        return release

    async def _follow(self, release_id: str) -> None:
        timer = _Timer(self._clock)
        self.state = "staging"
        try:
            with timer.step("stage_ms"):
                release = await self._stage(release_id)
            await self._swap(release, timer)
        except _Refused as e:
            if failure := self._engine.failure():
                raise EngineFailed(f"the engine has stopped: {failure}") from e
            self._settled = release_id
            await self._note(release_id, "refused", str(e), timer)
        finally:
            self.state = "serving"

    async def _stage(self, release_id: str) -> Release:
        """Have the release's weights lie beside the running ones. Raises _Refused."""
        if self.standby is not None and self.standby.id == release_id:
            return self.standby
        try:
            release, folder = await asyncio.to_thread(self._verified, release_id)
            await asyncio.to_thread(self._check_fits, release, folder)
            # By the running weights: a canary that the engine does not take is found out here.
            await self._engine.logprobs(release.canary.token_ids)
            self.standby = None
            await self._engine.stage(folder)
        except Exception as e:
            if self.standby is None:
                await self._engine.discard()
            raise _Refused(str(e)) from e
        return release

    async def _swap(self, release: Release, timer: "_Timer") -> None:
        """Drain, exchange, check. Does nothing where the target changed while others drained."""
        async with AsyncExitStack() as held:
            self.state = "waiting"
            turn = await self._turn_to_drain(release.id)
            if turn is None:
                if self.standby is None:
                    await self._engine.discard()
                return
            held.enter_context(turn)
            self.state = "swapping"
            with timer.step("drain_ms"):
                closing = self._gate.writing(self._options.drain_bound_s)
                timer.cut_short = await held.enter_async_context(closing)
            with timer.step("pause_ms"):
                reason = await self._exchange(release)
        self._settled = release.id
        if self.standby is None:
            await self._engine.discard()
        await self._note(release.id, "rolled_back" if reason else "swapped_in", reason, timer)

    async def _turn_to_drain(self, release_id: str) -> "IO[str] | nullcontext[None] | None":
        """At most one replica drains at a time. None where the target is another one by now."""
        while await asyncio.to_thread(self._registry.target_id) == release_id:
            try:
                if (turn := await asyncio.to_thread(self._registry.rollout.take_turn)) is not None:
                    return turn
            except OSError as e:  # a registry that cannot be written to has nobody to wait for
                log.warning("no turn to drain can be taken, going on without: %s", e)
                return nullcontext()
            await asyncio.sleep(self._options.poll_s)
        return None

    async def _exchange(self, release: Release) -> str | None:
        """Swap with the gate closed. None, or why the old weights are back. Raises EngineFailed."""
        old = self.serving
        assert old is not None
        try:
            async with asyncio.timeout(self._options.exchange_bound_s):
                reason = await self._exchange_weights(release.canary, old.canary)
        except Exception as e:
            self.serving = None
            raise EngineFailed(
                f"the engine's weights are in doubt after a swap to {release.id}: "
                f"{str(e) or type(e).__name__}"
            ) from e
        if reason:
            self.standby = None
        else:
            self.serving, self.standby = release, old if self._options.keep_previous else None
        return reason

    async def _exchange_weights(self, new: Canary, old: Canary) -> str | None:
        try:
            await self._engine.swap()
        except CacheKept as e:
            return str(e)
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
        kind = self._registry.artifacts.verify(release.artifact).kind
        if kind != POLICY:
            raise InvalidInput("release.artifact", f"an artifact of kind {POLICY}", kind)
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
        """Keep the change for who asks, and write it to the log."""
        at = dt.datetime.fromtimestamp(self._stamper.clock(), dt.UTC).isoformat()
        change = Change(release_id, outcome, reason, at, **timer.ms, cut_short=timer.cut_short)
        self.changes.append(change)
        log.log(
            logging.INFO if outcome == "swapped_in" else logging.ERROR,
            "release %s %s (stage %.0f ms, drain %.0f ms, pause %.1f ms, %d cut short)%s",
            *(release_id, outcome, *timer.ms.values(), timer.cut_short),
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


class _Refused(InstructloopError):
    """The release cannot be served; the running one is untouched."""


def _check_alone(folder: Path) -> None:
    checkpoint.check_whole(folder)
    for _ in checkpoint.finite_tensors(folder):
        pass


class _Timer:
    """Milliseconds of each step, 0 for one that was not reached."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.ms = {"stage_ms": 0.0, "drain_ms": 0.0, "pause_ms": 0.0}
        self.cut_short = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.ms[name] = round((self._clock() - began) * 1000, 3)
