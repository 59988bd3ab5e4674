"""Answer: one response by exactly one release, from the gate to its last byte."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
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
from serving.ahead import read_ahead
from serving.content_filter import FINISH, ContentFilter, filtered, filtered_stream
from serving.engine import Body, Engine, EngineRefused, Kind
from serving.errors import engine_error_body
from serving.gate import CutShort, Gate
from serving.limits import Limiter
from serving.metrics import Metrics
from serving.recorder import Permit, Recorder, Transcript
from serving.response import best, public
from serving.swap import WeightSwapper
from serving.telemetry import Visit, visit_of

log = logging.getLogger(__name__)

encoded = msgspec.json.Encoder().encode


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
    holds up no swap. Neither does one that is slow to read: the engine's answer is read ahead of
    it, and to bound that memory a stream is cut when its client kept it waiting too long.
    """

    def __init__(self, desk: Desk, ask: Ask) -> None:
        self._desk, self._ask = desk, ask
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = visit_of(scope)
        # A client that is slow to read holds up no swap either.
        async with aclosing(read_ahead(self._made(visit))) as bodies:
            release, first = await anext(bodies)
            if self._ask.body.get("stream"):
                await self._stream(_chunks(first, bodies), release, visit, send)
                return
            body = await self._whole(first, release, visit)
        await Response(encoded(body), 200, media_type="application/json")(scope, receive, send)

    async def _made(self, visit: Visit) -> AsyncGenerator[tuple[Release, Body], None]:
        """The body, or its chunks, with the release that makes them: all by the same one, because
        the gate is held for as long as the engine works.
        """
        async with self._desk.gate.reading():
            release = self._desk.serving(self._ask.release, self._ask.who.user_id)
            self._stamp(visit, release)
            with self._desk.swapper.adapters.answering(release) as adapter:
                result = await self._desk.engine.answer(self._ask.kind, self._ask.body, adapter)
                if isinstance(result, dict):
                    yield release, result
                    return
                async with aclosing(result) as chunks:
                    async for chunk in chunks:
                        yield release, chunk

    async def _whole(self, result: Body, release: Release, visit: Visit) -> Body:
        ask = self._ask
        if ask.body["n"] > ask.n:
            result = best(result, ask.n, ask.body["n"], ask.wants_logprobs)
        result = await self._judged(result, release)
        transcript = Transcript(ask.kind)
        transcript.add(result)
        await self._settle([(release, result["usage"])], visit)
        await self._record(transcript, release)
        return public(result, release, token_ids=ask.wants_token_ids, usage=True)

    async def _judged(self, result: Body, release: Release) -> Body:
        """The body as the content filter leaves it."""
        if self._desk.content_filter is not None:
            result = await filtered(result, self._desk.content_filter)
            self._count_filtered(result, release)
        return result

    async def _stream(
        self, chunks: AsyncGenerator[Body, None], release: Release, visit: Visit, send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        try:
            async with _patient(send, self._desk.stall_bound_s) as say:
                await say({"type": "http.response.start", "status": 200, "headers": headers})
                async with aclosing(self._events(chunks, release, visit)) as events:
                    async for event in events:
                        data = b"data: %b\n\n" % event
                        await say({"type": "http.response.body", "body": data, "more_body": True})
                await say({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            # The server closes the connection of a response that was left unfinished.
            visit.facts["error"] = "client too slow"
            self._desk.metrics.limits.labels("slow_client").inc()

    async def _events(
        self, chunks: AsyncGenerator[Body, None], release: Release, visit: Visit
    ) -> AsyncGenerator[bytes, None]:
        ask, transcript, usage = self._ask, Transcript(self._ask.kind), None
        if self._desk.content_filter is not None:
            chunks = filtered_stream(chunks, self._desk.content_filter)
        try:
            async with aclosing(chunks) as open_chunks:
                async for chunk in open_chunks:
                    usage = chunk.get("usage") or usage
                    if not chunk["choices"] and not ask.wants_usage:
                        continue
                    transcript.add(chunk)
                    self._count_filtered(chunk, release)
                    said = public(
                        chunk, release, token_ids=ask.wants_token_ids, usage=ask.wants_usage
                    )
                    yield encoded(said)
        except EngineRefused as e:  # the status is sent already, so the error is the last event
            yield encoded(engine_error_body(e))
        except CutShort as e:
            visit.facts["error"] = "cut short"
            yield encoded(error_body(503, str(e)))
        else:
            await self._settle([(release, usage or {})], visit)
            # Before the end of the stream: who has read it may rank it.
            await self._record(transcript, release)
        yield b"[DONE]"

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

    def _count_filtered(self, body: Body, release: Release) -> None:
        if self._desk.content_filter is None:
            return
        cut = sum(choice.get("finish_reason") == FINISH for choice in body["choices"])
        if cut:
            self._desk.metrics.filtered.labels(release.id).inc(cut)

    def _stamp(self, visit: Visit, *releases: Release) -> None:
        recorded = "true" if self._ask.permit is not None else "false"
        names = ",".join(release.id for release in releases)
        visit.headers["x-policy-release"] = visit.facts["release"] = names
        visit.headers["x-instructloop-recorded"] = recorded


@asynccontextmanager
async def _patient(send: Send, bound_s: float) -> AsyncGenerator[Send, None]:
    """A `send` that raises TimeoutError once a client has kept it waiting for `bound_s` in all.

    One timer for all that is sent: it looks again when the client's time could be up.
    """
    loop = asyncio.get_running_loop()
    waited, since = 0.0, None

    async def say(message: Message) -> None:
        nonlocal waited, since
        since = loop.time()
        try:
            await send(message)
        finally:
            waited += loop.time() - since
            since = None

    async def look() -> None:
        left = bound_s
        while left > 0:
            await asyncio.sleep(left)
            left = bound_s - waited - (0.0 if since is None else loop.time() - since)
        until.reschedule(loop.time())

    async with asyncio.timeout(None) as until:
        looking = asyncio.create_task(look())
        try:
            yield say
        finally:
            looking.cancel()


async def _chunks(
    first: Body, bodies: AsyncGenerator[tuple[Release, Body], None]
) -> AsyncGenerator[Body, None]:
    yield first
    async for _, chunk in bodies:
        yield chunk


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
