"""A service with the agreed HTTP API and no model, on a free port of the loopback interface."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

NOTICE = "2026-01"


@dataclass
class FakeService:
    """What it was asked, and how it misbehaves."""

    release: str = "r0001-aaaa"
    # What the last chunk of a stream claims; the release where None.
    last_chunk: str | None = None
    # Every so many requests for answers fail; none where 0.
    fail_every: int = 0
    granted: dict[str, bool] = field(default_factory=dict)
    consents: list[tuple[str, bool]] = field(default_factory=list)
    prompts: list[tuple[str, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    rankings: list[dict[str, Any]] = field(default_factory=list)
    idempotency_keys: list[str] = field(default_factory=list)

    def answer(self, key: str, body: dict[str, Any], chat: bool) -> Response:
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        self.prompts.append((key, prompt))
        self.requests.append(body)
        if self.fail_every and len(self.requests) % self.fail_every == 0:
            raise HTTPException(500)
        recorded = self.granted.get(key, False) and "production" not in key
        headers = {
            "x-policy-release": self.release,
            "x-instructloop-recorded": "true" if recorded else "false",
        }
        if body.get("stream"):
            return StreamingResponse(
                self.stream(chat), headers=headers, media_type="text/event-stream"
            )
        choices = [self.choice(i, chat) for i in range(body["n"])]
        return JSONResponse(self.body(choices, self.release), headers=headers)

    def body(self, choices: list[dict[str, Any]], stamp: str) -> dict[str, Any]:
        return {
            "id": f"cmpl-{len(self.requests)}",
            "object": "completion",
            "created": 0,
            "model": "tiny",
            "system_fingerprint": stamp,
            "choices": choices,
        }

    def choice(self, index: int, chat: bool) -> dict[str, Any]:
        text = f"A fox saw a drum{'.' * index}"
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {"index": index, "finish_reason": "stop", "logprobs": None, **said}

    async def stream(self, chat: bool) -> AsyncIterator[str]:
        for i, piece in enumerate(("A fox", " saw", ".")):
            said = {"delta": {"content": piece}} if chat else {"text": piece}
            choice = {"index": 0, "finish_reason": "stop" if i == 2 else None, **said}
            stamp = self.last_chunk if i == 2 and self.last_chunk else self.release
            yield f"data: {json.dumps(self.body([choice], stamp))}\n\n"
        yield "data: [DONE]\n\n"

    def app(self) -> FastAPI:
        app = FastAPI()

        def key_of(request: Request) -> str:
            return request.headers["authorization"].removeprefix("Bearer ")

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "x"}
            return {"object": "list", "data": [model]}

        @app.get("/v1/consent")
        def read_consent() -> dict[str, Any]:
            return {"object": "consent", "notice": {"version": NOTICE, "text": "..."}}

        @app.put("/v1/consent")
        async def set_consent(request: Request) -> None:
            body = await request.json()
            assert body["notice_version"] == NOTICE
            self.granted[key_of(request)] = body["granted"]
            self.consents.append((key_of(request), body["granted"]))

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            self.headers.append(dict(request.headers))
            return self.answer(key_of(request), await request.json(), chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.headers.append(dict(request.headers))
            return self.answer(key_of(request), await request.json(), chat=True)

        @app.post("/v1/feedback/rankings")
        async def rankings(request: Request) -> None:
            if not self.granted.get(key_of(request)):
                raise HTTPException(403)
            self.idempotency_keys.append(request.headers["idempotency-key"])
            self.rankings.append(await request.json())

        return app


@asynccontextmanager
async def running(service: FakeService) -> AsyncIterator[str]:
    """The service's base URL, while it runs."""
    config = uvicorn.Config(service.app(), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
