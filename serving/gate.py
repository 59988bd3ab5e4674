"""Gate: many answers or one swap at a time, first come, first served."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from contracts.errors import InstructloopError

CUT_AGAIN_S = 0.1


class CutShort(InstructloopError):
    """A swap ended this answer, which still ran after the swap's bound."""


class Gate:
    """A readers-writer lock for one event loop.

    Answers read, a swap writes. Who comes after a waiting writer waits behind it, so that a stream
    of new requests cannot starve a swap, and a swap makes nobody wait longer than its bound.
    """

    def __init__(self) -> None:
        # Each ends its reader when it is rescheduled to now.
        self._readers: set[asyncio.Timeout] = set()
        self._admitted = 0  # and not yet awake
        self._writing = False
        self._queue: deque[tuple[asyncio.Future[None], bool]] = deque()

    @property
    def running(self) -> int:
        """Answers inside."""
        return len(self._readers) + self._admitted

    @property
    def waiting(self) -> int:
        """Who waits to come in, a swap included."""
        return len(self._queue)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Raises CutShort where a swap could wait no longer."""
        await self._enter(writes=False)
        try:
            async with asyncio.timeout(None) as until:
                self._readers.add(until)
                self._admitted -= 1
                try:
                    yield
                finally:
                    self._readers.discard(until)
                    self._admit()
        except TimeoutError as e:
            if not until.expired():
                raise
            raise CutShort("The answer was ended: the server changes its weights.") from e

    @asynccontextmanager
    async def writing(self, bound_s: float) -> AsyncIterator[int]:
        """Yields the number of readers that were cut short because they had not left after
        `bound_s` seconds.
        """
        entering = asyncio.ensure_future(self._enter(writes=True))
        try:
            await asyncio.wait((entering,), timeout=bound_s)
            overdue = 0
            while not entering.done():
                overdue += self._cut()
                await asyncio.wait((entering,), timeout=CUT_AGAIN_S)
        except asyncio.CancelledError:
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
            if not entering.cancelled():
                self._end_writing()
            raise
        try:
            yield overdue
        finally:
            self._end_writing()

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
                self._admitted -= 1
        else:
            self._queue = deque(entry for entry in self._queue if entry[0] is not turn)
        self._admit()

    def _cut(self) -> int:
        """End who is inside; how many were not told before."""
        told = [reader for reader in self._readers if not reader.expired()]
        for reader in told:
            reader.reschedule(0)
        return len(told)

    def _end_writing(self) -> None:
        self._writing = False
        self._admit()

    def _admit(self) -> None:
        """Let in as many from the head of the queue as go together."""
        while self._queue and not self._writing:
            turn, writes = self._queue[0]
            if writes and self.running:
                return
            self._queue.popleft()
            if turn.done():
                continue
            if writes:
                self._writing = True
            else:
                self._admitted += 1
            turn.set_result(None)
