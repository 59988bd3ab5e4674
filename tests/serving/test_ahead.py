import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from serving.ahead import read_ahead


class Source:
    def __init__(self, items: int, fails: bool = False) -> None:
        self.items, self.fails, self.open = items, fails, False

    async def run(self) -> AsyncGenerator[int, None]:
        self.open = True
        try:
            for item in range(self.items):
                yield item
                await asyncio.sleep(0)
            if self.fails:
                raise OSError("broken")
        finally:
            self.open = False


def test_all_items_come_in_order() -> None:
    async def scene() -> None:
        assert [i async for i in read_ahead(Source(100).run())] == list(range(100))

    asyncio.run(scene())


def test_source_ends_while_its_reader_sleeps() -> None:
    async def scene() -> None:
        source = Source(5)
        async with aclosing(read_ahead(source.run())) as items:
            assert await anext(items) == 0
            for _ in range(20):
                await asyncio.sleep(0)
            assert not source.open
            assert [i async for i in items] == [1, 2, 3, 4]

    asyncio.run(scene())


def test_error_of_the_source_comes_after_its_items() -> None:
    async def scene() -> None:
        items = read_ahead(Source(3, fails=True).run())
        assert [await anext(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="broken"):
            await anext(items)

    asyncio.run(scene())


def test_reader_that_leaves_ends_the_source() -> None:
    async def scene() -> None:
        source = Source(1000)
        async with aclosing(read_ahead(source.run())) as items:
            await anext(items)
            assert source.open
        assert not source.open

    asyncio.run(scene())
