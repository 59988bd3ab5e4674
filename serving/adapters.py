"""Adapters: the adapter releases that are loaded beside the weights that they adapt."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import InvalidInput
from contracts.release import Release
from serving import canary, lora
from serving.engine import Engine


@dataclass(frozen=True)
class AdapterOptions:
    """How many adapters are kept loaded, one more while it comes in; 0 for none. And the highest
    rank that one may have.
    """

    most: int = 0
    max_rank: int = 16


class Adapters:
    """Loads and unloads adapters while answers go on: each answer stays with the adapter that it
    began with, and no adapter goes before its last answer has ended.
    """

    def __init__(
        self,
        engine: Engine,
        options: AdapterOptions,
        canary_tolerance: float,
        drain_bound_s: float,
    ) -> None:
        self._engine, self._options = engine, options
        self._tolerance, self._drain_bound_s = canary_tolerance, drain_bound_s
        # By id, those that came last at the end. Who is not in it gets no new answers.
        self.loaded: dict[str, Release] = {}
        self._running: Counter[str] = Counter()
        self._ended = asyncio.Event()

    async def load(self, release: Release, base: Path, folder: Path, kept: Collection[str]) -> None:
        """Check the adapter in `folder`, load it beside the weights of `base` and compare its
        canary. Makes room by unloading the oldest that is not to be `kept`.

        Raises InvalidInput, CanaryFailed, and what the engine raises; it is not loaded then.
        """
        if not self._options.most:
            raise InvalidInput("release.base", "none, as max_adapters is 0", release.base)
        await asyncio.to_thread(lora.check_fits, base, folder, self._options.max_rank)
        await self._make_room(kept)
        await self._engine.load_adapter(release.id, folder)
        try:
            await canary.check(self._engine, release.canary, self._tolerance, release.id)
        except Exception:
            await self._engine.unload_adapter(release.id)
            raise
        self.loaded[release.id] = release

    async def unload_all(self) -> None:
        """For other weights. Nothing may be in flight."""
        for release_id in list(self.loaded):
            await self._unload(release_id)

    @contextmanager
    def answering(self, release: Release) -> Iterator[str | None]:
        """The adapter of this release, which stays loaded meanwhile; None for a whole one."""
        if release.base is None:
            yield None
            return
        self._running[release.id] += 1
        try:
            yield release.id
        finally:
            self._running[release.id] -= 1
            self._ended.set()

    async def _make_room(self, kept: Collection[str]) -> None:
        while len(self.loaded) > self._options.most:
            oldest = next((name for name in self.loaded if name not in kept), None)
            if oldest is None:
                expected = f"at least {len(self.loaded)}, for what is served and what has a share"
                raise InvalidInput("max_adapters", expected, self._options.most)
            await self._unload(oldest)

    async def _unload(self, release_id: str) -> None:
        """Raises InvalidInput, with nothing changed, where its answers do not end in time."""
        release = self.loaded.pop(release_id)
        try:
            async with asyncio.timeout(self._drain_bound_s):
                while self._running[release_id]:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            self.loaded[release_id] = release
            expected = f"room within {self._drain_bound_s:g} s"
            raise InvalidInput("max_adapters", expected, f"answers by {release_id}") from None
        await self._engine.unload_adapter(release_id)
