import asyncio

import pytest

from serving.gate import CutShort, Gate


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def held(*visitors: "Visitor") -> list[bool]:
    return [visitor.inside for visitor in visitors]


class Visitor:
    """A task that holds the gate until told to leave."""

    def __init__(self, gate: Gate, *, writes: bool, bound_s: float = 10) -> None:
        self.inside, self.leave, self.cut = False, asyncio.Event(), 0
        self.task = asyncio.create_task(self._visit(gate, writes, bound_s))

    async def _visit(self, gate: Gate, writes: bool, bound_s: float) -> None:
        async with gate.writing(bound_s) if writes else gate.reading() as cut:
            self.inside, self.cut = True, cut or 0
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


def test_writer_cuts_short_who_has_not_left_after_its_bound() -> None:
    async def scene() -> None:
        gate = Gate()
        early, leaving = Visitor(gate, writes=False), Visitor(gate, writes=False)
        await settle()
        writer = Visitor(gate, writes=True, bound_s=0.05)
        await settle()
        late = Visitor(gate, writes=False)
        leaving.leave.set()
        with pytest.raises(CutShort):
            await early.task
        await leaving.task
        await settle()
        assert held(writer, late) == [True, False]
        assert writer.cut == 1
        writer.leave.set()
        await settle()
        assert held(late) == [True]
        late.leave.set()
        await late.task

    asyncio.run(scene())


def test_timeout_of_the_reader_itself_is_not_taken_for_a_cut() -> None:
    async def scene() -> None:
        with pytest.raises(TimeoutError):
            async with Gate().reading():
                raise TimeoutError

    asyncio.run(scene())


def test_writer_cancelled_while_it_waits_or_writes_leaves_no_trace() -> None:
    async def scene() -> None:
        gate = Gate()
        for reading in (True, False):
            reader = Visitor(gate, writes=False)
            await settle()
            if not reading:
                reader.leave.set()
            writer = Visitor(gate, writes=True)
            await settle()
            assert held(writer) == [not reading]
            writer.task.cancel()
            await settle()
            reader.leave.set()
            await reader.task
            async with gate.reading():
                assert (gate.running, gate.waiting) == (1, 0)

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
