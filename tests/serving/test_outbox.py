import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from serving.outbox import ClientTooSlow, outbox

HEAD: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Client:
    """Takes one message after another, as soon as it may: `open` says whether it reads."""

    def __init__(self, *, reads: bool = True) -> None:
        self.got: list[Message] = []
        self.open = asyncio.Event()
        if reads:
            self.open.set()

    async def send(self, message: Message) -> None:
        await self.open.wait()
        self.got.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.got[1:]]


def scene(act: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20):
            await act()

    asyncio.run(whole())


def test_parts_go_out_at_once_while_the_client_keeps_up() -> None:
    async def act() -> None:
        client, tasks = Client(), len(asyncio.all_tasks())
        async with outbox(client.send, HEAD, 60) as out:
            for number in range(3):
                out.put(b"%d" % number, last=number == 2)
                assert client.bodies[-1] == b"%d" % number
            assert len(asyncio.all_tasks()) == tasks
        assert client.got[0] is HEAD
        assert [message["more_body"] for message in client.got[1:]] == [True, True, False]

    scene(act)


def test_nothing_is_sent_before_the_first_part() -> None:
    async def act() -> None:
        client = Client()
        async with outbox(client.send, HEAD, 60) as out:
            assert not out.started
        assert client.got == []

    scene(act)


def test_who_makes_the_parts_does_not_wait_for_a_slow_client() -> None:
    async def act() -> None:
        client = Client(reads=False)
        async with outbox(client.send, HEAD, 60) as out:
            for number in range(100):
                out.put(b"%02d" % number)
            out.put(b".", last=True)
            assert client.got == []
            client.open.set()
        assert b"".join(client.bodies) == b"".join(b"%02d" % n for n in range(100)) + b"."
        assert len(client.bodies) == 1
        assert client.got[-1]["more_body"] is False

    scene(act)


def test_client_that_caught_up_gets_parts_at_once_again() -> None:
    async def act() -> None:
        client = Client(reads=False)
        async with outbox(client.send, HEAD, 60) as out:
            out.put(b"kept")
            client.open.set()
            await out.sent()
            out.put(b"at once")
            assert client.bodies == [b"kept", b"at once"]

    scene(act)


def test_client_that_keeps_us_waiting_too_long_is_cut() -> None:
    async def act() -> None:
        client = Client(reads=False)

        async def stream() -> None:
            async with outbox(client.send, HEAD, 0.05) as out:
                out.put(b"never read")
                await asyncio.sleep(60)

        with pytest.raises(ClientTooSlow):
            await stream()
        assert client.got == []
        assert len(asyncio.all_tasks()) == 1

    scene(act)


def test_waits_of_a_client_add_up() -> None:
    async def act() -> None:
        client = Client(reads=False)

        async def stream() -> None:
            async with outbox(client.send, HEAD, 0.3) as out:
                for _ in range(20):
                    out.put(b"late")
                    await asyncio.sleep(0.1)
                    client.open.set()
                    await out.sent()
                    client.open.clear()

        with pytest.raises(ClientTooSlow):
            await stream()
        assert 1 <= len(client.bodies) <= 4

    scene(act)


def test_what_sending_raises_is_raised_in_the_end() -> None:
    async def gone(message: Message) -> None:
        await asyncio.sleep(0)
        raise OSError("connection reset")

    async def act() -> None:
        with pytest.raises(OSError, match="reset"):
            async with outbox(gone, HEAD, 60) as out:
                out.put(b"part")

    scene(act)
