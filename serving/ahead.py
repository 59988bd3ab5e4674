"""read_ahead: what a source gives, at the source's own speed, whatever the reader's."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def read_ahead(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items of `source`, which runs to its end in a task of its own and then lets go of what it
    holds. Its exception is raised after its last item. Closing this ends the source.
    """
    made: deque[T] = deque()
    awaited: asyncio.Future[None] | None = None

    def wake() -> None:
        if awaited is not None and not awaited.done():
            awaited.set_result(None)

    async def fill() -> None:
        async with aclosing(source) as items:
            async for item in items:
                made.append(item)
                wake()

    filling = asyncio.create_task(fill())
    filling.add_done_callback(lambda _: wake())
    try:
        while made or not filling.done():
            if made:
                yield made.popleft()
            else:
                awaited = asyncio.get_running_loop().create_future()
                await awaited
        filling.result()
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
