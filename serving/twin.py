"""Twin: the second set of weights in the engine's worker, as the engine's adapter steers it."""

import asyncio
from pathlib import Path
from typing import Any

from contracts.errors import InstructloopError
from serving.push import Offer

STAGING_POLL_S = 0.05
# After a push's bound, for a worker that NCCL does not let go.
PUSH_GRACE_S = 5.0
FORGET_ATTEMPTS, FORGET_PAUSE_S = 20, 0.05


class StagingFailed(InstructloopError):
    """The engine could not take the weights; the running ones are untouched."""


class CacheKept(InstructloopError):
    """The engine could not forget its cached prefixes; nothing was exchanged."""


class Twin:
    """Of one AsyncLLM, whose worker has the methods of engine_worker.TwinWeights."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def stage(self, folder: Path) -> None:
        """Fill it from safetensors files. Raises StagingFailed."""
        await self._fill(folder.name, "twin_stage", str(folder))

    async def receive(self, offer: Offer, bound_s: float) -> None:
        """Fill it with what a trainer sends. Raises StagingFailed."""
        try:
            async with asyncio.timeout(bound_s + PUSH_GRACE_S):
                await self._fill(offer.release.id, "twin_receive", offer.model_dump_json(), bound_s)
        except TimeoutError:
            raise StagingFailed("the push took longer than it may") from None

    async def _fill(self, what: str, method: str, *args: object) -> None:
        try:
            await self._client.collective_rpc(method, args=args)
            while (states := set(await self._client.collective_rpc("twin_state"))) == {"staging"}:
                await asyncio.sleep(STAGING_POLL_S)
        except Exception as e:
            raise StagingFailed(f"the engine could not stage {what}: {e}") from e
        if states != {"ready"}:
            raise StagingFailed("; ".join(sorted(states - {"ready", "staging"})))

    async def swap(self) -> None:
        """Exchange the running weights and the twin's. Raises CacheKept, with nothing changed."""
        # The public pause_generation sleeps 20 ms after this call.
        await self._client.engine_core.pause_scheduler_async(mode="abort", clear_cache=True)
        try:
            # Nothing is cached between the two calls: the scheduler stands still.
            await self._forget_prefixes()
            await self._client.collective_rpc("twin_swap")
        finally:
            await self._client.resume_generation()

    async def discard(self) -> None:
        await self._client.collective_rpc("twin_discard")

    async def _forget_prefixes(self) -> None:
        """vLLM refuses while a block is in use: a request that just ended holds its own for a
        moment.
        """
        for _ in range(FORGET_ATTEMPTS):
            if await self._client.reset_prefix_cache():
                return
            await asyncio.sleep(FORGET_PAUSE_S)
        raise CacheKept("prefix cache: expected to be empty, but the engine keeps blocks of it")
