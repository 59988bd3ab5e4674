"""A plain stream says what vLLM's own handler says, whose code stands beside it here."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from serving.chunk import Chunk
from serving.engine import EngineRefused, _chunks
from serving.plain_stream import plainly

Outputs = list[tuple[int, RequestOutput]]
PROMPTS = {0: [5, 6, 7], 1: [8]}


def output(index: int, text: str, ids: list[int], reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(index, text, ids, None, None, finish_reason=reason)


def result(prompt: int, *outputs: CompletionOutput) -> tuple[int, RequestOutput]:
    ids = PROMPTS[prompt]
    return prompt, RequestOutput("r", "said before", ids, None, list(outputs), finished=False)


# Of two prompts with two answers each: parts of several tokens, text that is held back, and one
# that has nothing to say yet.
PARTS: Outputs = [
    result(0, output(0, "", [])),
    result(0, output(0, "a", [1]), output(1, "", [2])),
    result(1, output(0, "b", [3, 4])),
    result(0, output(1, "cd", [5])),
    result(1, output(1, "", [], "stop"), output(0, "", [6], "length")),
    result(0, output(0, "é\n", [7], "stop"), output(1, "", [9], "stop")),
]


class Handler(OpenAIServingCompletion):
    """vLLM's, without an engine."""

    def __init__(self) -> None:
        self.enable_force_include_usage = self.enable_prompt_tokens_details = False
        self.enable_per_request_metrics, self.system_fingerprint = False, None


class Engine:
    """Says `parts`, then fails if it has to; knows whether it was let go."""

    def __init__(self, parts: Outputs, failure: Exception | None = None) -> None:
        self.parts, self.failure, self.let_go = parts, failure, False

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        try:
            for part in self.parts:
                yield part
            if self.failure is not None:
                raise self.failure
        finally:
            self.let_go = True


def told(handler: Any, engine: Engine, **asked: Any) -> list[Chunk | EngineRefused]:
    """All chunks of a stream, or what ended it."""
    asked = {"stream_options": {"include_usage": True}, "n": 2, **asked}
    request = CompletionRequest(model="m", prompt="p", max_tokens=9, stream=True, **asked)

    async def listen() -> list[Chunk | EngineRefused]:
        found: list[Chunk | EngineRefused] = []
        lines = handler.completion_stream_generator(
            request,
            [{}, {}],
            engine.outputs(),
            "cmpl-1",
            17,
            "m",
            num_prompts=2,
            tokenizer=None,
            request_metadata=SimpleNamespace(),
        )
        try:
            async for chunk in _chunks(lines):
                found.append(chunk)  # noqa: PERF401  what came before an error counts
        except EngineRefused as e:
            found.append(e)
        return found

    return asyncio.run(listen())


def plain() -> Any:
    handler = Handler()
    plainly(handler)
    return handler


def seen(found: list[Chunk | EngineRefused], token_ids: bool) -> list[Any]:
    """As it is written to the client; where ids were not asked for they are null or not there."""
    for chunk in found:
        if isinstance(chunk, Chunk) and not token_ids:
            for choice in chunk.choices:
                assert choice.token_ids in (None, msgspec.UNSET)
                choice.token_ids = choice.prompt_token_ids = None
        if isinstance(chunk, Chunk):
            chunk.system_fingerprint = None
    return [msgspec.to_builtins(x) if isinstance(x, Chunk) else (str(x), x.status) for x in found]


@pytest.mark.parametrize("return_token_ids", [True, False])
@pytest.mark.parametrize("stream_options", [{"include_usage": True}, None])
def test_it_says_what_vllm_says(
    return_token_ids: bool, stream_options: dict[str, bool] | None
) -> None:
    asked = {"return_token_ids": return_token_ids, "stream_options": stream_options}
    ours, theirs = (told(h, Engine(PARTS[1:]), **asked) for h in (plain(), Handler()))
    assert all(isinstance(chunk, Chunk) for chunk in ours)
    assert seen(ours, return_token_ids) == seen(theirs, return_token_ids)
    assert len(ours) == 7 + (stream_options is not None)


def test_an_answer_that_has_nothing_to_say_yet_is_not_told_and_keeps_its_prompts_ids() -> None:
    first = told(plain(), Engine(PARTS), return_token_ids=True)[0]
    assert isinstance(first, Chunk)
    [choice] = first.choices
    assert (choice.index, choice.text, choice.prompt_token_ids) == (0, "a", PROMPTS[0])


@pytest.mark.parametrize(
    "engine",
    [
        Engine([*PARTS[1:3], result(0, output(0, "", [], "error"))]),
        Engine(PARTS[1:3], ValueError("the input is too long")),
        Engine(PARTS[1:3], RuntimeError("broken")),
    ],
    ids=["part", "refusal", "failure"],
)
def test_a_stream_that_fails_says_so_as_vllms_does(engine: Engine) -> None:
    ours, theirs = (seen(told(h, engine), False) for h in (plain(), Handler()))
    assert ours == theirs
    assert isinstance(ours[-1], tuple)


@pytest.mark.parametrize("asked", [{"echo": True}, {"logprobs": 1}])
def test_what_is_not_plain_is_vllms(asked: dict[str, Any]) -> None:
    handler, left = Handler(), []

    async def vllms(request: CompletionRequest, *_: Any, **__: Any) -> AsyncGenerator[str, None]:
        left.append(request.echo or request.logprobs)
        yield "data: [DONE]\n\n"

    handler.completion_stream_generator = vllms  # type: ignore[method-assign]
    plainly(handler)
    assert told(handler, Engine(PARTS), **asked) == []
    assert left == [True if "echo" in asked else 1]


def test_who_hangs_up_lets_the_engine_go() -> None:
    engine = Engine(PARTS)

    async def hang_up() -> None:
        request = CompletionRequest(model="m", prompt="p", max_tokens=9, stream=True)
        lines = plain().completion_stream_generator(
            request, [], engine.outputs(), "cmpl-1", 17, "m", num_prompts=2
        )
        chunks = _chunks(lines)
        await anext(chunks)
        assert not engine.let_go
        await chunks.aclose()
        assert engine.let_go

    asyncio.run(hang_up())
