import asyncio

import pytest

from serving.gate import Gate


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def held(*visitors: "Visitor") -> list[bool]:
    return [visitor.inside for visitor in visitors]


class Visitor:
    """A task that holds the gate until told to leave."""

    def __init__(self, gate: Gate, *, writes: bool, bound_s: float = 10) -> None:
        self.inside, self.leave = False, asyncio.Event()
        self.task = asyncio.create_task(self._visit(gate, writes, bound_s))

    async def _visit(self, gate: Gate, writes: bool, bound_s: float) -> None:
        async with gate.writing(bound_s) if writes else gate.reading():
            self.inside = True
            await self.leave.wait()
        self.inside = False


def test_readers_share_and_a_writer_waits_for_all_of_them() -> None:
    async def scene() -> None:
        gate = Gate()
        a, b = Visitor(gate, writes=False), Visitor(gate, writes=False)
        writer = Visitor(gate, writes=True)
        await settle()
        assert held(a, b, writer) == [True, True, False]
        a.leave.set()
        await settle()
        assert held(writer) == [False]
        b.leave.set()
        await settle()
        assert held(writer) == [True]
        writer.leave.set()
        await writer.task

    asyncio.run(scene())


def test_newcomers_wait_behind_a_waiting_writer() -> None:
    async def scene() -> None:
        gate = Gate()
        early = Visitor(gate, writes=False)
        await settle()
        writer = Visitor(gate, writes=True)
        await settle()
        late = Visitor(gate, writes=False)
        await settle()
        assert held(late) == [False]
        early.leave.set()
        await settle()
        assert held(writer, late) == [True, False]
        writer.leave.set()
        await settle()
        assert held(late) == [True]
        late.leave.set()
        await late.task

    asyncio.run(scene())


def test_writer_gives_up_after_its_bound_and_lets_newcomers_in() -> None:
    async def scene() -> None:
        gate = Gate()
        early = Visitor(gate, writes=False)
        await settle()
        writer = Visitor(gate, writes=True, bound_s=0.05)
        await settle()
        late = Visitor(gate, writes=False)
        with pytest.raises(TimeoutError):
            await writer.task
        await settle()
        assert held(late) == [True]
        early.leave.set()
        late.leave.set()
        await asyncio.gather(early.task, late.task)
        async with gate.writing(1):  # nothing is held any more
            pass

    asyncio.run(scene())


def test_cancelled_reader_leaves_no_trace() -> None:
    async def scene() -> None:
        gate = Gate()
        inside = Visitor(gate, writes=False)
        await settle()
        writer = Visitor(gate, writes=True)
        await settle()
        waiting = Visitor(gate, writes=False)
        await settle()
        waiting.task.cancel()
        inside.task.cancel()
        await settle()
        assert held(writer) == [True]
        writer.task.cancel()
        await settle()
        async with gate.reading():
            pass

    asyncio.run(scene())


def test_reader_admitted_in_the_moment_of_its_cancellation_gives_its_place_back() -> None:
    async def scene() -> None:
        gate = Gate()
        writer = Visitor(gate, writes=True)
        await settle()
        reader = Visitor(gate, writes=False)
        await settle()
        writer.leave.set()
        await asyncio.sleep(0)  # the writer leaves and admits the reader, which has not run yet
        reader.task.cancel()
        await settle()
        async with gate.writing(1):
            pass

    asyncio.run(scene())
