"""BoundedBody: how long a request's body may be, on every route, whoever reads it.

FastAPI reads and parses a body before it asks who sends it.
"""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BoundedBody:
    """Pure ASGI. Whoever reads more than `most` bytes, or than `more` has for the path, gets an
    HTTPException, status 413.
    """

    def __init__(self, app: ASGIApp, most: int, more: Mapping[str, int]) -> None:
        self._app, self._most, self._more = app, most, more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, read = self._more.get(scope["path"], self._most), 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, f"body: expected at most {most} bytes, got more")
            return message

        await self._app(scope, bounded, send)
