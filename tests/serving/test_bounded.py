import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import pytest
from fastapi import Body, FastAPI

from serving.bounded import Bounded
from tests.serving.house import House, house


@pytest.mark.parametrize("path", ["v1/feedback/edits", "v1/admin/keys", "v1/consent"])
def test_without_a_key_nobody_fills_the_memory(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    def sent(here: House, size: int) -> httpx.Response:
        method = "PUT" if path == "v1/consent" else "POST"
        headers = {"content-type": "application/json"}
        body = b'"' + b"a" * (size - 2) + b'"'
        return httpx.request(method, f"{here.url}/{path}", content=body, headers=headers)

    with house(tmp_path_factory.mktemp("house")) as here:
        assert sent(here, 1 << 20).status_code == 401
        refused = sent(here, (1 << 20) + 1)
    assert refused.status_code == 413
    assert refused.json()["error"]["message"] == "body: expected at most 1048576 bytes, got more"
    assert refused.headers["x-request-id"]


def test_a_request_that_does_not_arrive_is_given_up() -> None:
    app = FastAPI()

    @app.post("/")
    def read(said: Annotated[list[int], Body()]) -> int:
        return len(said)

    async def slow() -> AsyncIterator[bytes]:
        yield b"[1,"
        await asyncio.Event().wait()

    async def ask() -> tuple[int, int]:
        transport = httpx.ASGITransport(Bounded(app, max_bytes=100, bound_s=0.05))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            late = await client.post("/", content=slow(), headers=headers)
            return late.status_code, (await client.post("/", json=[1, 2])).status_code

    assert asyncio.run(ask()) == (408, 200)
