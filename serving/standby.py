"""Standby: the weights beside the running ones, ready to take their place, and whose they are."""

import asyncio
from pathlib import Path

from contracts.errors import InvalidInput
from contracts.release import Release, ReleaseRegistry
from serving import checkpoint
from serving.checkpoint import Checkpoint
from serving.engine import Engine
from serving.push import Offer

POLICY, ADAPTER = "policy", "adapter"


class Standby:
    """Lets in nothing but the running model with other weights. What that model is stays as it was
    when the engine started, so it is known also where the running weights are on no disk.
    """

    def __init__(self, engine: Engine, registry: ReleaseRegistry) -> None:
        self._engine, self._registry = engine, registry
        self._running: tuple[str, Checkpoint] | None = None
        # The one before the last swap, or what was pushed; None where nothing needs to stay.
        self.release: Release | None = None

    def has(self, release_id: str) -> bool:
        return self.release is not None and self.release.id == release_id

    def verified(self, release_id: str) -> tuple[Release, Path]:
        """The release and its folder, every byte read again. Raises NotFound or CorruptArtifact."""
        release = self._registry.get(release_id)
        wanted = POLICY if release.base is None else ADAPTER
        kind = self._registry.artifacts.verify(release.artifact).kind
        if kind != wanted:
            raise InvalidInput("release.artifact", f"an artifact of kind {wanted}", kind)
        return release, self._registry.artifacts.path(release.artifact)

    async def start(self, release: Release, folder: Path) -> None:
        """Start the engine. Raises InvalidInput unless the folder is whole and finite."""
        found = await asyncio.to_thread(_whole, folder)
        await self._engine.start(folder, release.model)
        self._running = release.model, found

    async def stage(self, release: Release, folder: Path) -> None:
        """From disk. Raises InvalidInput, and what the engine raises."""
        await self._check(release, await asyncio.to_thread(checkpoint.read, folder))
        self.release = None
        await self._engine.stage(folder)

    async def receive(self, offer: Offer, bound_s: float) -> None:
        """From a trainer; the registry knows the release then. Raises InvalidInput,
        CorruptArtifact, and what the engine raises.
        """
        await asyncio.to_thread(self._registry.check_id, offer.release)
        await self._check(offer.release, await asyncio.to_thread(offer.checkpoint))
        self.release = None
        await self._engine.receive(offer, bound_s)
        await asyncio.to_thread(self._registry.add, offer.release)
        self.release = offer.release

    async def tidy(self) -> None:
        """Free what is there and of nobody."""
        if self.release is None and self._running is not None:
            await self._engine.discard()

    def check_model(self, release: Release) -> None:
        """Raise InvalidInput unless clients ask for the release by the name that is served."""
        assert self._running is not None
        if release.model != self._running[0]:
            raise InvalidInput("release.model", self._running[0], release.model)

    async def _check(self, release: Release, found: Checkpoint) -> None:
        assert self._running is not None
        self.check_model(release)
        checkpoint.check_interchangeable(self._running[1], found)
        # By the running weights: a canary that the engine does not take is found out here.
        await self._engine.logprobs(release.canary.token_ids)


def _whole(folder: Path) -> Checkpoint:
    found = checkpoint.read(folder)
    for _ in checkpoint.finite_tensors(folder):
        pass
    return found
