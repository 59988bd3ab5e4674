"""The operator's routes for releases: what is served, swap, pin, roll back, drain."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from contracts.errors import InvalidInput
from contracts.release import RELEASE_ID, ReleaseRegistry
from serving.engine import Body
from serving.push import Offer
from serving.replica import ReplicaReporter
from serving.swap import WeightSwapper
from serving.transport import Kind

ReleaseId = Annotated[str, Field(pattern=rf"^{RELEASE_ID}$")]


class Wanted(BaseModel):
    """Which release."""

    model_config = ConfigDict(extra="forbid")

    release: ReleaseId


class Shared(BaseModel):
    """Which release, and the part of the people that it answers; 0 for none."""

    model_config = ConfigDict(extra="forbid")

    release: ReleaseId
    share: Annotated[float, Field(strict=True, ge=0, le=1)]


class Pinned(BaseModel):
    """Which release; None for the one that should be served now."""

    model_config = ConfigDict(extra="forbid")

    release: ReleaseId | None = None


@dataclass(frozen=True)
class Bridge:
    """What an operator sees and steers: the registry, and this replica."""

    registry: ReleaseRegistry
    swapper: WeightSwapper
    replica: ReplicaReporter
    # How a trainer may hand over weights; None: not at all.
    push: Kind | None = None

    async def status(self) -> Body:
        """What this replica serves, what it should, and what the other replicas say."""
        registry, swapper, replica = self.registry, self.swapper, self.replica
        replicas = await run_in_threadpool(registry.rollout.replicas, replica.now())
        own = replica.record()
        return {
            "object": "status",
            **own.model_dump(mode="json", exclude={"at"}),
            "standby": swapper.standby.id if swapper.standby else None,
            "loaded": list(swapper.loaded),
            "shares": swapper.shares.parts,
            "current": await run_in_threadpool(registry.current_id),
            "pinned": await run_in_threadpool(registry.pinned_id),
            "push": self.push,
            "counts": Counter(change.outcome for change in swapper.changes),
            "last_change": asdict(swapper.changes[-1]) if swapper.changes else None,
            "replicas": [
                r.model_dump(mode="json") | {"lost": r.is_lost(replica.now())}
                for r in [*(r for r in replicas if r.name != own.name), own]
            ],
        }

    async def releases(self) -> Body:
        """Every release with its lineage, and when which one was to be served and why."""
        known = await run_in_threadpool(self.registry.releases)
        turns = await run_in_threadpool(self.registry.turns)
        return {
            "object": "list",
            "data": [release.model_dump(mode="json", exclude={"canary"}) for release in known],
            "history": [turn.model_dump(mode="json") for turn in turns],
        }

    async def change(self, how: Callable[..., object], *wanted: str | None) -> Body:
        """Change the registry, and the status once this replica followed. Raises HTTPException
        where it could not.
        """
        await run_in_threadpool(how, *wanted)
        # Shielded: a client that leaves does not break a swap off.
        await asyncio.shield(asyncio.ensure_future(self.swapper.look(again=True)))
        own = self.replica.record()
        if own.serving != own.target:
            raise HTTPException(
                409, f"{own.target} should be served, and {own.serving} still is: {own.reason}"
            )
        return await self.status()

    async def share(self, release_id: str, share: float) -> Body:
        """Change the shares, and the status once this replica followed. Raises HTTPException where
        it could not load the release.
        """
        await run_in_threadpool(self.registry.share, release_id, share)
        await asyncio.shield(asyncio.ensure_future(self.swapper.look(again=True)))
        if share and release_id not in self.swapper.loaded:
            tried = [c.reason for c in self.swapper.changes if c.release == release_id]
            reason = tried[-1] if tried else "nothing is served yet"
            raise HTTPException(409, f"{release_id} has a share and is not loaded: {reason}")
        return await self.status()

    async def receive(self, offer: Offer) -> Body:
        """Take the weights that a trainer offers, and the status once they stand by. Raises
        HTTPException where they are refused.
        """
        if offer.transport != self.push:
            raise InvalidInput("transport", f"{self.push}, as this server is set", offer.transport)
        # Shielded: what a trainer that leaves has begun is brought to an end.
        taking = asyncio.ensure_future(self.swapper.receive(offer))
        if (reason := await asyncio.shield(taking)) is not None:
            raise HTTPException(409, f"{offer.release.id} is refused: {reason}")
        return await self.status()

    async def drain(self, *, out: bool) -> Body:
        """Take this replica out of service, so that it is not ready and answers what still comes;
        or put it back.
        """
        self.replica.draining = out
        return await self.status()


def router(bridge: Bridge, admin: Callable[..., Any]) -> APIRouter:
    """The routes; each demands a key through the dependency `admin`.

    What they change is in the registry, so every replica follows; the replies are of this one.
    """
    routes = APIRouter(prefix="/v1/admin", tags=["releases"], dependencies=[Depends(admin)])
    registry = bridge.registry
    routes.get("/status")(bridge.status)
    routes.get("/releases")(bridge.releases)

    @routes.post("/swap")
    async def swap(wanted: Wanted) -> Body:
        """Serve this release now; one that was refused before is tried again."""
        return await bridge.change(registry.swap_to, wanted.release)

    @routes.post("/pin")
    async def pin(pinned: Pinned) -> Body:
        """Stay on this release, whatever is published, until it is unpinned."""
        return await bridge.change(registry.pin, pinned.release)

    @routes.post("/unpin")
    async def unpin() -> Body:
        """Follow what is published again."""
        return await bridge.change(registry.unpin)

    @routes.post("/rollback")
    async def rollback() -> Body:
        """Serve the parent of the release that should be served now."""
        return await bridge.change(registry.rollback)

    @routes.post("/share")
    async def share(shared: Shared) -> Body:
        """Let a part of the people be answered by this release, each person always by the same."""
        return await bridge.share(shared.release, shared.share)

    @routes.post("/drain")
    async def drain() -> Body:
        """Take this replica out of service: it is not ready, and answers what still comes."""
        return await bridge.drain(out=True)

    @routes.post("/undrain")
    async def undrain() -> Body:
        """Put this replica back."""
        return await bridge.drain(out=False)

    if bridge.push is not None:

        @routes.post("/push")
        async def push(offer: Offer) -> Body:
            """Take weights from a trainer, ahead of a swap to them."""
            return await bridge.receive(offer)

    return routes
