"""Gate: many answers or one swap at a time, first come, first served."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """A readers-writer lock for one event loop.

    Answers read, a swap writes. Who comes after a waiting writer waits behind it, so that a stream
    of new requests cannot starve a swap, and a swap makes nobody wait longer than the answers that
    were running when it came.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._queue: deque[tuple[asyncio.Future[None], bool]] = deque()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        await self._enter(writes=False)
        try:
            yield
        finally:
            self._readers -= 1
            self._admit()

    @asynccontextmanager
    async def writing(self, bound_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError when the readers have not left after `bound_s` seconds; then nothing
        is held.
        """
        async with asyncio.timeout(bound_s):
            await self._enter(writes=True)
        try:
            yield
        finally:
            self._writing = False
            self._admit()

    async def _enter(self, writes: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((turn, writes))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave_queue(turn, writes)
            raise

    def _leave_queue(self, turn: asyncio.Future[None], writes: bool) -> None:
        if (
            turn.done() and not turn.cancelled()
        ):  # admitted in the moment of the cancellation: give it back
            if writes:
                self._writing = False
            else:
                self._readers -= 1
        else:
            self._queue = deque(entry for entry in self._queue if entry[0] is not turn)
        self._admit()

    def _admit(self) -> None:
        """Let in as many from the head of the queue as go together."""
        while self._queue and not self._writing:
            turn, writes = self._queue[0]
            if writes and self._readers:
                return
            self._queue.popleft()
            if turn.done():
                continue
            if writes:
                self._writing = True
            else:
                self._readers += 1
            turn.set_result(None)
