"""Outbox: a streamed response on its way to a client, for whom nobody waits."""

import asyncio
import types
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.types import Message, Send

from contracts.errors import InstructloopError


class ClientTooSlow(InstructloopError):
    """The client kept a stream waiting longer than it may."""


class Outbox:
    """Sends the parts of one response in order; whoever makes them never waits for the client.

    While the client keeps up, a part is sent at once, without a task of its own: a stream has
    thousands. What a slow client does not take is kept and sent joined, by a task aside.
    """

    def __init__(self, send: Send, head: Message, bound_s: float, until: asyncio.Timeout) -> None:
        self._send, self._head, self._left_s, self._until = send, head, bound_s, until
        self._kept, self._last = bytearray(), False
        self._sending: asyncio.Task[None] | None = None
        self._bound: asyncio.TimerHandle | None = None
        # Whether the client has heard of a response.
        self.started = False

    def put(self, part: bytes, *, last: bool = False) -> None:
        """A part of the body; the `last` one ends it."""
        if not self.started:
            self.started = True
            self._go(self._head)
        if self._sending is None:
            self._go(_body(part, last))
        else:
            self._kept += part
            self._last = last

    async def sent(self) -> None:
        """Wait until the client has everything. Raises what sending raised."""
        if self._sending is not None:
            await self._sending

    async def close(self) -> None:
        """Stop sending."""
        if self._bound is not None:
            self._bound.cancel()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def _go(self, message: Message) -> None:
        rest = _at_once(self._send(message))
        if rest is not None:
            loop = asyncio.get_running_loop()
            self._bound = loop.call_later(self._left_s, self._until.reschedule, 0)
            self._sending = loop.create_task(self._go_on(rest, self._bound, loop.time()))

    async def _go_on(self, rest: Awaitable[None], bound: asyncio.TimerHandle, since: float) -> None:
        """Send what is under way and all that came meanwhile."""
        await rest
        while self._kept or self._last:
            part, last = bytes(self._kept), self._last
            self._kept, self._last = bytearray(), False
            await self._send(_body(part, last))
        bound.cancel()
        self._left_s -= asyncio.get_running_loop().time() - since
        self._sending = None


@asynccontextmanager
async def outbox(send: Send, head: Message, bound_s: float) -> AsyncGenerator[Outbox, None]:
    """An Outbox; at the end all of it is sent, after `head`. Raises ClientTooSlow, also in the
    middle, once the client has kept it waiting for `bound_s` seconds in all.
    """
    try:
        async with asyncio.timeout(None) as until:
            out = Outbox(send, head, bound_s, until)
            try:
                yield out
                await out.sent()
            finally:
                await out.close()
    except TimeoutError as e:
        if not until.expired():
            raise
        raise ClientTooSlow(f"The client kept the stream waiting for {bound_s:g} s.") from e


def _body(part: bytes, last: bool) -> Message:
    return {"type": "http.response.body", "body": part, "more_body": not last}


def _at_once(call: Awaitable[None]) -> Awaitable[None] | None:
    """Run `call` until it waits for something. The rest of it; None where it never waited.

    A task that starts eagerly, which asyncio has from Python 3.12 on.
    """
    steps = call.__await__()
    try:
        return _rest(steps, next(steps))
    except StopIteration:
        return None


@types.coroutine
def _rest(steps: Generator[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """`steps` from where it waits for `awaited`."""
    while True:
        try:
            got = yield awaited
            go_on = partial(steps.send, got)
        except BaseException as e:  # noqa: BLE001  whatever it is, it is for `steps`
            go_on = partial(steps.throw, e)
        try:
            awaited = go_on()
        except StopIteration:
            return
