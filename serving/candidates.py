"""Candidates: one prompt answered by several releases, as one completion to be ranked."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from contracts.errors import InvalidInput
from contracts.events import MAX_RANKED
from contracts.release import RELEASE_ID, Release
from serving.answer import Answer, Ask, Desk, encoded
from serving.engine import Body, Kind
from serving.recorder import Transcript
from serving.request import MAX_CHOICES, described, first_fault
from serving.response import ChatChoice, ChatCompletion, TextChoice, TextCompletion, public
from serving.telemetry import Visit, visit_of

# Fields of completions and chat that have no meaning here.
NOT_HERE = ("n", "best_of", "stream", "stream_options")
KINDS: tuple[Kind, ...] = ("completions", "chat")


class Candidate(BaseModel):
    """One of the releases that answer, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    release: Annotated[str, Field(pattern=rf"^{RELEASE_ID}$")]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1


class _Candidates(BaseModel):
    model_config = ConfigDict(frozen=True)

    candidates: Annotated[list[Candidate], Field(min_length=1, max_length=MAX_RANKED)]


class ComparedText(TextChoice):
    release: str


class ComparedMessage(ChatChoice):
    release: str


class TextComparison(TextCompletion):
    choices: list[ComparedText]  # type: ignore[assignment]


class ChatComparison(ChatCompletion):
    choices: list[ComparedMessage]  # type: ignore[assignment]


def candidates_in(body: Body) -> tuple[list[Candidate], Kind, Body]:
    """The candidates, and what they are asked as a completion or chat request with their number
    for `n`. Raises InvalidInput.
    """
    asked = {name: value for name, value in body.items() if name != "candidates"}
    with first_fault({name: body[name] for name in body.keys() - asked.keys()}) as said:
        found = _Candidates.model_validate(said).candidates
    if len({candidate.release for candidate in found}) < len(found):
        raise InvalidInput("candidates", "each release once", "one twice")
    for name in NOT_HERE:
        if asked.pop(name, None) not in (None, False):
            raise InvalidInput(name, "nothing beside candidates", "a value")
    if "@" in str(asked.get("model")):
        raise InvalidInput("model", "a name alone beside candidates", "a name with a release")
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
        raise InvalidInput("prompt", "one text, or its tokens", "a list of others")
    kind: Kind = "chat" if "messages" in asked else "completions"
    return found, kind, asked | {"n": sum(candidate.n for candidate in found)}


class Comparison(Answer):
    """An ASGI response with the answers of all candidates, made at the same time."""

    def __init__(self, desk: Desk, ask: Ask, candidates: Sequence[Candidate]) -> None:
        super().__init__(desk, ask)
        self._candidates = candidates

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = visit_of(scope)
        made = await self._made(visit)
        parts = [(release, await self._judged(body, release)) for release, body in made]
        await self._settle([(release, body["usage"]) for release, body in parts], visit)
        whole, first = merged(parts), parts[0][0]
        transcript = Transcript(self._ask.kind)
        transcript.add(whole)
        await self._record(transcript, first)
        said = public(whole, first, token_ids=self._ask.wants_token_ids)
        said["system_fingerprint"] = visit.headers["x-policy-release"]
        await Response(encoded(said), 200, media_type="application/json")(scope, receive, send)

    async def _made(self, visit: Visit) -> list[tuple[Release, Body]]:
        """Each release with its body, in the order of the candidates."""
        engine, ask = self._desk.engine, self._ask
        async with self._desk.gate.reading():
            releases = [self._desk.serving(candidate.release) for candidate in self._candidates]
            self._stamp(visit, *releases)
            with ExitStack() as held:
                adapters = [
                    held.enter_context(self._desk.swapper.adapters.answering(release))
                    for release in releases
                ]
                asked = [
                    asyncio.create_task(
                        engine.answer(ask.kind, ask.body | {"n": candidate.n}, adapter)
                    )
                    for candidate, adapter in zip(self._candidates, adapters, strict=True)
                ]
                try:
                    bodies: list[Any] = await asyncio.gather(*asked)
                finally:
                    for task in asked:
                        task.cancel()
                    await asyncio.gather(*asked, return_exceptions=True)
        return list(zip(releases, bodies, strict=True))


def merged(parts: Sequence[tuple[Release, Body]]) -> Body:
    """One body under the first one's id: all choices, numbered on, each with its release."""
    choices: list[Body] = []
    for release, body in parts:
        by = {"release": release.id, "release_digest": release.artifact}
        for choice in sorted(body["choices"], key=lambda choice: int(choice["index"])):
            choices.append(choice | {"index": len(choices), **by})
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: sum(body["usage"][name] for _, body in parts) for name in names}
    return parts[0][1] | {"choices": choices, "usage": usage}


def described_candidates(max_n: int) -> Body:
    """The request body for the OpenAPI document: a completion's or a chat's, with candidates."""
    bodies = [described(kind, max_n) for kind in KINDS]
    found = [body["requestBody"]["content"]["application/json"]["schema"] for body in bodies]
    candidate = Candidate.model_json_schema()
    candidate["properties"]["n"]["maximum"] = max_n
    listed = {"type": "array", "items": candidate, "minItems": 1, "maxItems": MAX_RANKED}
    for schema in found:
        for name in NOT_HERE:
            schema["properties"].pop(name, None)
        schema["dependentSchemas"].pop("stream_options")
        schema["properties"]["candidates"] = listed
        schema["required"] = [*schema["required"], "candidates"]
    content = {"application/json": {"schema": {"anyOf": found}}}
    return {"requestBody": {"required": True, "content": content}}


def documented_candidates() -> dict[int | str, Body]:
    """The responses for the OpenAPI document."""
    return {200: {"model": TextComparison | ChatComparison, "description": "All answers in one."}}
