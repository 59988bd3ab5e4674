"""Answer: one response by exactly one release, from the gate to its last byte."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from contracts.access import Principal
from contracts.errors import NotFound
from contracts.refusal import error_body
from contracts.release import Release
from serving.chunk import Chunk
from serving.content_filter import FINISH, ContentFilter, filtered, filtered_stream
from serving.engine import Body, Engine, EngineRefused, Kind
from serving.errors import engine_error_body
from serving.gate import CutShort, Gate
from serving.limits import Limiter
from serving.metrics import Metrics
from serving.outbox import ClientTooSlow, Outbox, outbox
from serving.recorder import Permit, Recorder, Transcript
from serving.response import best, make_public, public
from serving.swap import WeightSwapper
from serving.telemetry import Visit, visit_of

log = logging.getLogger(__name__)

encoded = msgspec.json.Encoder().encode

STREAM_HEAD: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Ask:
    """One checked request: what the engine gets, and what the client and the log get."""

    kind: Kind
    # As the engine gets it.
    body: Body
    who: Principal
    # The release that the client named with the model, if it did.
    release: str | None
    # Answers for each prompt, of as many samples as `body["n"]` says.
    n: int
    wants_logprobs: bool
    wants_token_ids: bool
    wants_usage: bool
    permit: Permit | None
    # Tokens that were counted against the key's limit in advance; None where there is no limit.
    tokens_taken: int | None


@dataclass(frozen=True)
class Desk:
    """What every answer needs."""

    engine: Engine
    gate: Gate
    swapper: WeightSwapper
    recorder: Recorder
    limiter: Limiter
    metrics: Metrics
    content_filter: ContentFilter | None
    # How long a client may keep a stream waiting, in all, in seconds.
    stall_bound_s: float

    def serving(self, named: str | None = None, user_id: str | None = None) -> Release:
        """The release that answers: the one that is named, or that the person has. Raises
        EngineRefused while there is none, and NotFound where another one is named.
        """
        swapper = self.swapper
        if swapper.serving is None:
            raise EngineRefused("The model is still loading.", status=503)
        if named is None:
            return (user_id and swapper.release_for(user_id)) or swapper.serving
        if named in swapper.loaded:
            return swapper.loaded[named]
        model = swapper.serving.model
        loaded = ", ".join(f"`{model}@{name}`" for name in swapper.loaded)
        raise NotFound(f"The model `{model}@{named}` is not loaded; loaded: {loaded}.", "model")


class Answer(Response):
    """An ASGI response that holds the gate while the engine works, so that no swap falls into it.

    The gate is entered here and not in a middleware: a client that is slow to send its request
    holds up no swap. Neither does one that is slow to read: an Outbox keeps what it has not taken
    and, to bound that memory, cuts a stream when its client kept it waiting too long.
    """

    def __init__(self, desk: Desk, ask: Ask) -> None:
        self._desk, self._ask = desk, ask
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_disconnected(receive, self._answer(scope, receive, send))
        except BaseException:
            visit_of(scope).headers["x-instructloop-recorded"] = "false"
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = visit_of(scope)
        if self._ask.body.get("stream"):
            await self._stream(visit, send)
            return
        body = await self._whole(visit)
        await Response(encoded(body), 200, media_type="application/json")(scope, receive, send)

    @asynccontextmanager
    async def _answering(self, visit: Visit) -> AsyncIterator[tuple[Release, str | None]]:
        """The release that makes all of this answer, and its adapter; both stay meanwhile."""
        async with self._desk.gate.reading():
            release = self._desk.serving(self._ask.release, self._ask.who.user_id)
            self._stamp(visit, release)
            with self._desk.swapper.adapters.answering(release) as adapter:
                yield release, adapter

    async def _whole(self, visit: Visit) -> Body:
        ask = self._ask
        async with self._answering(visit) as (release, adapter):
            result = await self._desk.engine.answer(ask.kind, ask.body, adapter)
        assert isinstance(result, dict)
        if ask.body["n"] > ask.n:
            result = best(result, ask.n, ask.body["n"], ask.wants_logprobs)
        result = await self._judged(result, release)
        transcript = Transcript(ask.kind)
        transcript.add(result)
        await self._settle([(release, result["usage"])], visit)
        await self._record(transcript, release)
        return public(result, release, token_ids=ask.wants_token_ids)

    async def _judged(self, result: Body, release: Release) -> Body:
        """The body as the content filter leaves it."""
        if self._desk.content_filter is not None:
            result = await filtered(result, self._desk.content_filter)
            self._count_filtered([c.get("finish_reason") for c in result["choices"]], release)
        return result

    async def _stream(self, visit: Visit, send: Send) -> None:
        try:
            async with outbox(send, STREAM_HEAD, self._desk.stall_bound_s) as out:
                await self._events(visit, out)
        except ClientTooSlow:
            # The server closes the connection of a response that was left unfinished.
            visit.facts["error"] = "client too slow"
            self._desk.metrics.limits.labels("slow_client").inc()

    async def _events(self, visit: Visit, out: Outbox) -> None:
        """Every chunk as an event, all by the release that is served when the gate is entered."""
        transcript, usage, end = Transcript(self._ask.kind), Body(), b""
        try:
            async with (
                self._answering(visit) as (release, adapter),
                aclosing(await self._chunks(adapter)) as chunks,
            ):
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    if chunk.choices:
                        transcript.hear(chunk)
                        if self._desk.content_filter is not None:
                            self._count_filtered([c.finish_reason for c in chunk.choices], release)
                        out.put(self._event(chunk, release))
                    elif self._ask.wants_usage:
                        end = self._event(chunk, release)
        except (EngineRefused, CutShort) as e:
            if not out.started:
                raise
            # The status is sent already, so the error is the last event.
            end = _event(self._failed(e, visit))
        else:
            await out.sent()
            await self._settle([(release, usage)], visit)
            # Before the end of the stream: who has read it may rank it.
            await self._record(transcript, release)
        out.put(end + DONE, last=True)

    async def _chunks(self, adapter: str | None) -> AsyncGenerator[Chunk, None]:
        chunks = await self._desk.engine.answer(self._ask.kind, self._ask.body, adapter)
        assert not isinstance(chunks, dict)
        if self._desk.content_filter is None:
            return chunks
        return filtered_stream(chunks, self._desk.content_filter)

    def _event(self, chunk: Chunk, release: Release) -> bytes:
        ask = self._ask
        make_public(chunk, release, token_ids=ask.wants_token_ids, usage=ask.wants_usage)
        return _event(chunk)

    def _failed(self, error: EngineRefused | CutShort, visit: Visit) -> Body:
        if isinstance(error, EngineRefused):
            return engine_error_body(error)
        visit.facts["error"] = "cut short"
        return error_body(503, str(error))

    async def _record(self, transcript: Transcript, release: Release) -> None:
        if self._ask.permit is not None:
            self._desk.metrics.recorded.labels(release.id).inc()
            await self._desk.recorder.record(self._ask.permit, transcript, release)

    async def _settle(self, usages: Sequence[tuple[Release, Body]], visit: Visit) -> None:
        """Count the tokens that it cost in the end, by the releases that made it."""
        ask, used = self._ask, 0
        for release, usage in usages:
            for name in ("prompt_tokens", "completion_tokens"):
                tokens = int(usage.get(name) or 0)
                used += tokens
                visit.facts[name] = int(visit.facts.get(name, 0)) + tokens
                kind = name.removesuffix("_tokens")
                self._desk.metrics.tokens.labels(release.id, kind).inc(tokens)
        if ask.tokens_taken is not None and used > ask.tokens_taken:
            limiter = self._desk.limiter
            await limiter.aside(limiter.settle, ask.who, ask.tokens_taken, used)

    def _count_filtered(self, finish_reasons: Sequence[str | None], release: Release) -> None:
        if cut := finish_reasons.count(FINISH):
            self._desk.metrics.filtered.labels(release.id).inc(cut)

    def _stamp(self, visit: Visit, *releases: Release) -> None:
        recorded = "true" if self._ask.permit is not None else "false"
        names = ",".join(release.id for release in releases)
        visit.headers["x-policy-release"] = visit.facts["release"] = names
        visit.headers["x-instructloop-recorded"] = recorded


def _event(body: Body | Chunk) -> bytes:
    return b"data: %b\n\n" % encoded(body)


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
