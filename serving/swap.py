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
from serving import canary, checkpoint
from serving.adapters import AdapterOptions, Adapters
from serving.canary import CanaryFailed
from serving.changes import Changes, Timer
from serving.engine import CacheKept, Engine
from serving.gate import Gate

log = logging.getLogger(__name__)

State = Literal["loading", "serving", "staging", "waiting", "swapping"]

POLICY, ADAPTER = "policy", "adapter"


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
        # The one before `base`, whose weights are still in memory.
        self.standby: Release | None = None
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
            await self.look()
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
                await self._changes.note(release_id, "refused", str(e), timer)
                continue
            self.state = "serving"
            await self._changes.note(release_id, "swapped_in", None, timer)
            return
        raise EngineFailed("no release in the registry can be served")

    async def _start(self, release_id: str) -> Release:
        release, folder = await asyncio.to_thread(self._verified, release_id)
        base, weights = release, folder
        if release.base is not None:
            whole = await asyncio.to_thread(self._registry.whole, release.base)
            base, weights = await asyncio.to_thread(self._verified, whole.id)
        await asyncio.to_thread(_check_alone, weights)
        await self._engine.start(weights, base.model)
        await self._check_canary(base.canary)
        self.base = base
        if release.base is not None:
            await self._load_adapter(release, folder)
        return release

    async def _follow(self, release_id: str) -> None:
        async with self._attempt(release_id) as timer:
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
            async with self._attempt(release_id) as timer:
                with timer.step("stage_ms"):
                    await self._stage(release_id, beside=True)
                await self._changes.note(release_id, "loaded", None, timer)

    @asynccontextmanager
    async def _attempt(self, release_id: str) -> AsyncIterator[Timer]:
        """Try to have a release: one that is refused is noted, and left out."""
        timer = Timer(self._clock)
        self.state = "staging"
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
            self.state = "serving"

    async def _stage(self, release_id: str, *, beside: bool = False) -> Release:
        """Have the release's weights lie beside the running ones, or its adapter loaded; with
        `beside` only an adapter. Raises _Refused.
        """
        if release_id in self.loaded:
            return self.loaded[release_id]
        if self.standby is not None and self.standby.id == release_id and not beside:
            return self.standby
        try:
            release, folder = await asyncio.to_thread(self._verified, release_id)
            if beside or release.base is not None:
                await self._load_adapter(release, folder)
            else:
                await self._stage_weights(release, folder)
        except Exception as e:
            if self.standby is None:
                await self._engine.discard()
            raise _Refused(str(e)) from e
        return release

    async def _stage_weights(self, release: Release, folder: Path) -> None:
        await asyncio.to_thread(self._check_fits, release, folder)
        # By the running weights: a canary that the engine does not take is found out here.
        await self._engine.logprobs(release.canary.token_ids)
        self.standby = None
        await self._engine.stage(folder)

    async def _load_adapter(self, release: Release, folder: Path) -> None:
        assert self.base is not None
        self._check_model(release)
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
            self.standby = None
        else:
            self.serving = self.base = release
            self.standby = old if self._options.keep_previous else None
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

    def _verified(self, release_id: str) -> tuple[Release, Path]:
        """The release and its folder, every byte read again. Raises NotFound or CorruptArtifact."""
        release = self._registry.get(release_id)
        wanted = POLICY if release.base is None else ADAPTER
        kind = self._registry.artifacts.verify(release.artifact).kind
        if kind != wanted:
            raise InvalidInput("release.artifact", f"an artifact of kind {wanted}", kind)
        return release, self._registry.artifacts.path(release.artifact)

    def _check_fits(self, release: Release, folder: Path) -> None:
        assert self.base is not None
        self._check_model(release)
        running = self._registry.artifacts.path(self.base.artifact)
        checkpoint.check_interchangeable(running, folder)

    def _check_model(self, release: Release) -> None:
        assert self.base is not None
        if release.model != self.base.model:
            raise InvalidInput("release.model", self.base.model, release.model)

    async def _check_canary(self, said: Canary) -> None:
        await canary.check(self._engine, said, self._options.canary_tolerance)


class _Refused(InstructloopError):
    """The release cannot be served; the running one is untouched."""


def _check_alone(folder: Path) -> None:
    checkpoint.check_whole(folder)
    for _ in checkpoint.finite_tensors(folder):
        pass
