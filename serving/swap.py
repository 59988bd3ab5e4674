"""WeightSwapper: new release > verify > stage > drain > swap > check > open, or roll back."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from contracts.errors import CorruptArtifact, InstructloopError, InvalidInput
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.shares import Shares
from serving import canary
from serving.adapters import AdapterOptions, Adapters
from serving.canary import CanaryFailed
from serving.changes import Changes, Source, Timer
from serving.engine import Engine
from serving.gate import Gate
from serving.push import Offer
from serving.standby import Standby
from serving.twin import CacheKept

log = logging.getLogger(__name__)

State = Literal["loading", "serving", "staging", "waiting", "swapping"]


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
    # How long a trainer may take to send weights.
    push_bound_s: float = 300.0
    adapters: AdapterOptions = field(default_factory=AdapterOptions)


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
        self._options, self._clock = options, clock
        self._standby = Standby(engine, registry)
        self._changes = Changes(registry, sink, stamper)
        self.changes = self._changes.all
        # What every answer that is let through the gate now is made by, unless its person has
        # another release by a share or by name; None while loading.
        self.serving: Release | None = None
        # The release whose weights run: what is served, or what that adapts.
        self.base: Release | None = None
        self.adapters = Adapters(
            engine, options.adapters, options.canary_tolerance, options.drain_bound_s
        )
        self.shares = Shares()
        # What the registry wanted when it was read last.
        self.target: str | None = None
        self.state: State = "loading"
        # The target that was dealt with last: a refused release is not tried again until the target
        # changes, or somebody asks for it.
        self._settled: str | None = None
        # What was refused beside it, until the shares or the weights change.
        self._left_out: set[str] = set()
        self._looking = asyncio.Lock()
        self._failure: EngineFailed | None = None

    @property
    def standby(self) -> Release | None:
        """Whose weights are in memory beside those of `base`: the one before, or a pushed one."""
        return self._standby.release

    @property
    def loaded(self) -> dict[str, Release]:
        """What can answer, by id."""
        whole = {self.base.id: self.base} if self.base is not None else {}
        return whole | self.adapters.loaded

    def release_for(self, user_id: str) -> Release | None:
        """What answers this person; None while loading."""
        return self.loaded.get(self.shares.release_of(user_id) or "", self.serving)

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
        async with self._alone():
            await self._look(again)

    async def receive(self, offer: Offer) -> str | None:
        """Have the weights that a trainer offers lie beside the running ones, and their release
        known: to swap to it reads nothing. None, or why they are refused.
        """
        release_id = offer.release.id
        if self.serving is None:  # its load may take minutes, for which no trainer should wait
            return "push: expected a server that has loaded its first release, got none yet"
        async with self._alone():
            if offer.release in (*self.loaded.values(), self.standby):
                return None
            async with self._attempt(release_id, offer.transport) as timer:
                with timer.step("stage_ms"):
                    async with self._refusing():
                        await self._standby.receive(offer, self._options.push_bound_s)
                await self._changes.note(release_id, "loaded", None, timer)
            return self._changes.all[-1].reason

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self._looking:
            if self._failure is not None:
                raise self._failure
            try:
                yield
            except EngineFailed as e:  # whoever looked, `run` ends by it
                self._failure = e
                raise

    async def _look(self, again: bool) -> None:
        self.target = await asyncio.to_thread(self._registry.target_id)
        if self.target is None:
            return
        if self.target != self._settled or again:
            if self.serving is None:
                await self._load_first()
            elif self.target != self.serving.id:
                await self._follow(self.target)
            else:
                self._settled = self.target
        await self._follow_shares(again)

    async def _watch(self) -> None:
        """An engine may die while a swap waits for it."""
        while (failure := self._engine.failure()) is None:
            if self._failure is not None:
                raise self._failure
            await asyncio.sleep(self._options.poll_s)
        raise EngineFailed(f"the engine has stopped: {failure}")

    async def _follow_registry(self) -> None:
        while True:
            try:
                await self.look()
            except OSError as e:
                log.warning("the registry cannot be read, going on with what is served: %s", e)
            await asyncio.sleep(self._options.poll_s)

    async def _load_first(self) -> None:
        """Start the engine on the wanted release or, if that is bad, on the last one before it that
        is not.
        """
        history = await asyncio.to_thread(self._registry.history)
        for release_id in dict.fromkeys(reversed(history)):
            timer = Timer(self._clock)
            self._settled = self._settled or release_id
            try:
                with timer.step("stage_ms"):
                    self.serving = await self._start(release_id)
            except Exception as e:  # noqa: BLE001  whatever is wrong with it, the one before may be right
                self.base = None
                await self._engine.stop()
                # Where the whole process group is told to end, the engine hears it first.
                await asyncio.sleep(self._options.poll_s)
                await self._changes.note(release_id, "refused", str(e), timer)
                continue
            self.state = "serving"
            await self._changes.note(release_id, "swapped_in", None, timer)
            return
        raise EngineFailed("no release in the registry can be served")

    async def _start(self, release_id: str) -> Release:
        verified = self._standby.verified
        release, folder = await asyncio.to_thread(verified, release_id)
        base, weights = release, folder
        if release.base is not None:
            whole = await asyncio.to_thread(self._registry.whole, release.base)
            base, weights = await asyncio.to_thread(verified, whole.id)
        await self._standby.start(base, weights)
        await self._check_canary(base.canary)
        self.base = base
        if release.base is not None:
            await self._load_adapter(release, folder)
        return release

    async def _follow(self, release_id: str) -> None:
        known = release_id in self.loaded or self._standby.has(release_id)
        async with self._attempt(release_id, "memory" if known else "disk") as timer:
            with timer.step("stage_ms"):
                release = await self._stage(release_id)
            if release_id not in self.loaded:
                await self._swap(release, timer)
                return
            self.serving, self._settled = release, release_id
            await self._changes.note(release_id, "swapped_in", None, timer)

    async def _follow_shares(self, again: bool) -> None:
        """Load what has a share of the people. They are answered by what is served until it is."""
        try:
            shares = await asyncio.to_thread(self._registry.shares)
        except (CorruptArtifact, OSError) as e:
            log.warning("shares cannot be read, going on with those before: %s", e)
            return
        if again or shares != self.shares:
            if self._settled in self._left_out:  # there may be room for the target now
                self._settled = None
            self._left_out.clear()
        self.shares = shares
        for release_id in shares.parts:
            if release_id in self.loaded or release_id in self._left_out:
                continue
            async with self._attempt(release_id, "disk") as timer:
                with timer.step("stage_ms"):
                    await self._stage(release_id, beside=True)
                await self._changes.note(release_id, "loaded", None, timer)

    @asynccontextmanager
    async def _attempt(self, release_id: str, source: Source) -> AsyncIterator[Timer]:
        """Try to have a release: one that is refused is noted, and left out."""
        timer = Timer(self._clock, source)
        before, self.state = self.state, "staging"
        try:
            yield timer
        except _Refused as e:
            if failure := self._engine.failure():
                raise EngineFailed(f"the engine has stopped: {failure}") from e
            self._left_out.add(release_id)
            if release_id == self.target:
                self._settled = release_id
            await self._changes.note(release_id, "refused", str(e), timer)
        finally:
            self.state = before

    async def _stage(self, release_id: str, *, beside: bool = False) -> Release:
        """Have the release's weights lie beside the running ones, or its adapter loaded; with
        `beside` only an adapter. Raises _Refused.
        """
        if release_id in self.loaded:
            return self.loaded[release_id]
        if self.standby is not None and self._standby.has(release_id) and not beside:
            return self.standby
        async with self._refusing():
            release, folder = await asyncio.to_thread(self._standby.verified, release_id)
            if beside or release.base is not None:
                await self._load_adapter(release, folder)
            else:
                await self._standby.stage(release, folder)
        return release

    @asynccontextmanager
    async def _refusing(self) -> AsyncIterator[None]:
        try:
            yield
        except Exception as e:
            await self._standby.tidy()
            raise _Refused(str(e)) from e

    async def _load_adapter(self, release: Release, folder: Path) -> None:
        assert self.base is not None
        self._standby.check_model(release)
        if release.base != self.base.artifact:
            served = f"{self.base.artifact}, of {self.base.id}, which is served"
            raise InvalidInput("release.base", served, release.base)
        weights = self._registry.artifacts.path(self.base.artifact)
        kept = {*self.shares.parts, *([self.serving.id] if self.serving else [])}
        await self.adapters.load(release, weights, folder, kept)

    async def _swap(self, release: Release, timer: Timer) -> None:
        """Drain, exchange, check. Does nothing where the target changed while others drained."""
        async with AsyncExitStack() as held:
            self.state = "waiting"
            turn = await self._turn_to_drain(release.id)
            if turn is None:
                await self._standby.tidy()
                return
            held.enter_context(turn)
            self.state = "swapping"
            with timer.step("drain_ms"):
                closing = self._gate.writing(self._options.drain_bound_s)
                timer.cut_short = await held.enter_async_context(closing)
            with timer.step("pause_ms"):
                reason = await self._exchange(release)
        self._settled = release.id
        await self._standby.tidy()
        await self._changes.note(
            release.id, "rolled_back" if reason else "swapped_in", reason, timer
        )

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
        old = self.base
        assert old is not None
        try:
            async with asyncio.timeout(self._options.exchange_bound_s):
                reason = await self._exchange_weights(release.canary, old.canary)
                if reason is None:  # they adapt the weights before
                    await self.adapters.unload_all()
        except Exception as e:
            self.serving = None
            raise EngineFailed(
                f"the engine's weights are in doubt after a swap to {release.id}: "
                f"{str(e) or type(e).__name__}"
            ) from e
        if reason:
            self._standby.release = None
        else:
            self.serving = self.base = release
            self._standby.release = old if self._options.keep_previous else None
            self._left_out.clear()
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

    async def _check_canary(self, said: Canary) -> None:
        await canary.check(self._engine, said, self._options.canary_tolerance)


class _Refused(InstructloopError):
    """The release cannot be served; the running one is untouched."""
