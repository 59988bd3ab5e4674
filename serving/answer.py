"""Answer: one response by exactly one release, from the gate to its last byte."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from contracts.release import Release
from serving.ahead import read_ahead
from serving.engine import Body, Engine, EngineRefused, Kind
from serving.errors import error_body
from serving.gate import CutShort, Gate
from serving.recorder import Permit, Recorder, Transcript
from serving.swap import WeightSwapper

# What OpenAI's bodies have; the engine's own extras stay inside.
PUBLIC_FIELDS = ("id", "object", "created", "model", "choices", "usage")
PUBLIC_CHOICE_FIELDS = ("index", "text", "message", "delta", "logprobs", "finish_reason")
TOKEN_FIELDS = ("token_ids", "prompt_token_ids")
PUBLIC_MESSAGE_FIELDS = ("role", "content", "refusal")


@dataclass(frozen=True)
class Ask:
    """One checked request: what the engine gets, and what the client and the log get."""

    kind: Kind
    body: Body
    wants_token_ids: bool
    permit: Permit | None

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))


@dataclass(frozen=True)
class Desk:
    """What every answer needs."""

    engine: Engine
    gate: Gate
    swapper: WeightSwapper
    recorder: Recorder


class Answer(Response):
    """An ASGI response that holds the gate while it is made, so that no swap falls into it.

    The gate is entered here and not in a middleware: a client that is slow to send its request
    holds up no swap.
    """

    def __init__(self, desk: Desk, ask: Ask) -> None:
        self._desk, self._ask = desk, ask
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that is slow to read holds up no swap either.
        async with aclosing(read_ahead(self._made())) as bodies:
            release, first = await anext(bodies)
            if self._ask.body.get("stream"):
                await self._stream(release, first, bodies, send)
            else:
                await self._whole(first, release)
                body = json.dumps(self._public(first, release), ensure_ascii=False)
                await Response(body, 200, self._stamps(release), "application/json")(
                    scope, receive, send
                )

    async def _made(self) -> AsyncGenerator[tuple[Release, Body], None]:
        """The body, or its chunks, with the release that makes them: all by the same one, because
        the gate is held for as long as the engine works.
        """
        async with self._desk.gate.reading():
            release = self._desk.swapper.serving
            if release is None:
                raise EngineRefused("The model is still loading.", status=503)
            result = await self._desk.engine.answer(self._ask.kind, self._ask.body)
            if isinstance(result, dict):
                yield release, result
                return
            async with aclosing(result) as chunks:
                async for chunk in chunks:
                    yield release, chunk

    async def _whole(self, result: Body, release: Release) -> None:
        transcript = Transcript(self._ask.kind)
        transcript.add(result)
        await self._record(transcript, release)

    async def _stream(
        self,
        release: Release,
        first: Body,
        bodies: AsyncGenerator[tuple[Release, Body], None],
        send: Send,
    ) -> None:
        headers = self._stamps(release) | {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        async with aclosing(self._events(release, first, bodies)) as events:
            async for event in events:
                data = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(
        self, release: Release, first: Body, bodies: AsyncGenerator[tuple[Release, Body], None]
    ) -> AsyncGenerator[str, None]:
        transcript = Transcript(self._ask.kind)
        transcript.add(first)
        yield json.dumps(self._public(first, release), ensure_ascii=False)
        try:
            async for _, chunk in bodies:
                transcript.add(chunk)
                yield json.dumps(self._public(chunk, release), ensure_ascii=False)
        except EngineRefused as e:  # the status is sent already, so the error is the last event
            yield json.dumps(error_body(e.status, str(e), e.param))
        except CutShort as e:
            yield json.dumps(error_body(503, str(e)))
        else:
            # Before the end of the stream: who has read it may rank it.
            await self._record(transcript, release)
        yield "[DONE]"

    async def _record(self, transcript: Transcript, release: Release) -> None:
        if self._ask.permit is not None:
            await self._desk.recorder.record(self._ask.permit, transcript, release)

    def _stamps(self, release: Release) -> dict[str, str]:
        recorded = "true" if self._ask.permit is not None else "false"
        return {"x-policy-release": release.id, "x-instructloop-recorded": recorded}

    def _public(self, body: Body, release: Release) -> Body:
        public = {name: body[name] for name in PUBLIC_FIELDS if name in body}
        public["choices"] = [self._public_choice(choice) for choice in body["choices"]]
        public["system_fingerprint"] = release.id
        if self._ask.wants_usage:
            public.setdefault("usage", None)
        return public

    def _public_choice(self, choice: Body) -> Body:
        fields = PUBLIC_CHOICE_FIELDS + (TOKEN_FIELDS if self._ask.wants_token_ids else ())
        public = {name: choice[name] for name in fields if name in choice}
        for name in ("message", "delta"):
            if name in public:
                public[name] = {f: v for f, v in public[name].items() if f in PUBLIC_MESSAGE_FIELDS}
        public.setdefault("logprobs", None)
        public.setdefault("finish_reason", None)
        return public


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it when the client goes away, so that the engine stops and nothing is
    recorded.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
