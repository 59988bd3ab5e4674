"""Bounded: no request is larger, or takes longer to arrive, than the server's settings say."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Bounded:
    """Pure ASGI, around every route: some of them read a body before they look at its key."""

    def __init__(self, app: ASGIApp, max_bytes: int, bound_s: float) -> None:
        self._app, self._max_bytes, self._bound_s = app, max_bytes, bound_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        until = asyncio.get_running_loop().time() + self._bound_s
        size, whole = 0, False

        async def bounded() -> Message:
            """Raises HTTPException, which the frameworks let through as it is."""
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
            if size > self._max_bytes:
                raise HTTPException(
                    413, f"body: expected at most {self._max_bytes} bytes, got more"
                )
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, bounded, send)
