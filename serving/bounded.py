"""Bounded: no request is larger, or takes longer to arrive, than the server's settings say."""

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Bounded:
    """Pure ASGI, around every route: some of them read a body before they look at its key.

    Whoever reads more than `max_bytes`, or than `larger` has for the path, gets an HTTPException of
    status 413; who waits longer than `bound_s`, one of 408.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int], bound_s: float
    ) -> None:
        self._app, self._bound_s = app, bound_s
        self._max_bytes, self._larger = max_bytes, larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        until = asyncio.get_running_loop().time() + self._bound_s
        most = self._larger.get(scope["path"], self._max_bytes)
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                told = f"The request did not arrive within {self._bound_s:g} s."
                raise HTTPException(408, told) from None
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"body: expected at most {most} bytes, got more")
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, bounded, send)
