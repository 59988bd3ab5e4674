import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import httpx
from fastapi import Body, FastAPI

from serving.bounded import Bounded
from serving.settings import Settings
from tests.serving.house import house

ROUTES = [
    ("PUT", "/v1/consent"),
    ("POST", "/v1/feedback/rankings"),
    ("POST", "/v1/feedback/comments"),
    ("POST", "/v1/admin/keys"),
    ("POST", "/v1/admin/swap"),
]


def test_no_route_reads_more_than_a_body_may_have_not_even_without_a_key(tmp_path: Path) -> None:
    settings = Settings(release_poll_s=0.02, max_body_bytes=1024, push="tcp")
    headers = {"content-type": "application/json"}
    with house(tmp_path, settings) as here, httpx.Client(base_url=here.url) as client:
        for method, path in ROUTES:
            most, more = (
                client.request(method, path, content=b'"%b"' % (b"a" * size), headers=headers)
                for size in (1022, 1023)
            )
            assert (most.status_code, more.status_code) == (401, 413), path
            assert more.json()["error"]["message"] == "body: expected at most 1024 bytes, got more"
            assert more.headers["x-request-id"]
        with here.client() as ann:
            assert ann.post("/v1/completions", content=b" " * 1025).status_code == 413
        offer = client.post("/v1/admin/push", content=b" " * 1025, headers=headers)
        assert offer.status_code != 413  # an offer grows with the model


def test_a_request_that_does_not_arrive_is_given_up() -> None:
    app = FastAPI()

    @app.post("/")
    def read(said: Annotated[list[int], Body()]) -> int:
        return len(said)

    async def slow() -> AsyncIterator[bytes]:
        yield b"[1,"
        await asyncio.Event().wait()

    async def ask() -> tuple[int, int]:
        transport = httpx.ASGITransport(Bounded(app, 100, {}, bound_s=0.05))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            late = await client.post("/", content=slow(), headers=headers)
            return late.status_code, (await client.post("/", json=[1, 2])).status_code

    assert asyncio.run(ask()) == (408, 200)
