import asyncio
import datetime as dt
import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from contracts.release import Canary, Release
from serving import engine
from serving.chunk import Chunk
from serving.response import make_public

RELEASE = Release(
    id="r1",
    model="tiny",
    created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    artifact="digest",
    canary=Canary(token_ids=(1, 2), logprobs=(0.0,)),
    code_version="test",
)
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "engine"}
TEXT = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "stop_reason": 7}
IDS = {"prompt_token_ids": [1], "token_ids": [2]}


def read(*bodies: dict[str, Any]) -> list[Chunk]:
    async def events() -> AsyncGenerator[str, None]:
        for body in bodies:
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"

    async def chunks() -> list[Chunk]:
        return [chunk async for chunk in engine._chunks(events())]

    return asyncio.run(chunks())


def said(body: dict[str, Any], *, token_ids: bool = False, usage: bool = False) -> Any:
    (chunk,) = read(body)
    make_public(chunk, RELEASE, token_ids=token_ids, usage=usage)
    return json.loads(msgspec.json.encode(chunk))


def test_a_client_gets_openais_fields_and_no_others() -> None:
    body = {**HEAD, "choices": [{**TEXT, **IDS}], "metrics": {}, "usage": None}
    choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
    ours = {**HEAD, "model": "tiny", "system_fingerprint": "r1"}
    assert said(body) == {**ours, "choices": [choice]}
    assert said(body, token_ids=True, usage=True) == {
        **ours,
        "choices": [{**choice, **IDS}],
        "usage": None,
    }
    counted = {**HEAD, "choices": [], "usage": {"prompt_tokens": 1}}
    assert said(counted, usage=True) == {**counted, **ours}


def test_a_delta_keeps_what_it_says_and_no_empty_list_of_calls() -> None:
    delta: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "reasoning": "hm",
        "tool_calls": [],
    }
    body = {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    (choice,) = said(body)["choices"]
    assert choice["delta"] == {"role": "assistant", "content": ""}
    delta["tool_calls"] = [{"index": 0, "function": {"arguments": "{"}}]
    (choice,) = said(body)["choices"]
    assert choice["delta"]["tool_calls"] == delta["tool_calls"]


def test_the_arguments_of_a_call_begin_as_a_text_to_add_to() -> None:
    """So does OpenAI's own example of reading them."""
    parts = [{"index": 0, "id": "c1", "function": {"name": "f"}}]
    parts += [{"index": 0, "function": {"arguments": text}} for text in ("{", "}")]
    deltas: list[Any] = [
        {**HEAD, "choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in parts
    ]
    calls = [said(body)["choices"][0]["delta"]["tool_calls"][0]["function"] for body in deltas]
    assert [call["arguments"] for call in calls] == ["", "{", "}"]


def test_an_error_among_the_chunks_is_raised() -> None:
    error = {"message": "broken", "type": "InternalServerError", "param": None, "code": 500}
    with pytest.raises(engine.EngineRefused, match="broken") as caught:
        read({**HEAD, "choices": [TEXT]}, {"error": error})
    assert caught.value.status == 500
