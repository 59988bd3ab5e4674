import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InvalidInput
from serving.chunk import Choice, Chunk
from serving.content_filter import WordFilter, filtered, filtered_stream, load


def whole(text: str, *words: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": {"tokens": [text]}, "finish_reason": "stop"}
    judged = asyncio.run(filtered({"choices": [choice]}, WordFilter(words)))
    (said,) = judged["choices"]
    return dict(said)


chunk = partial(Chunk, id="cmpl-1", object="text_completion", created=1, model="tiny")


def streamed(parts: list[str], *words: str) -> tuple[str, list[str | None]]:
    async def chunks() -> AsyncGenerator[Chunk, None]:
        for i, part in enumerate(parts):
            end = "length" if i + 1 == len(parts) else None
            yield chunk(choices=[Choice(0, text=part, finish_reason=end)])
        yield chunk(choices=[], usage={})

    async def read() -> list[Chunk]:
        return [chunk async for chunk in filtered_stream(chunks(), WordFilter(words))]

    said = [choice for chunk in asyncio.run(read()) for choice in chunk.choices]
    return "".join(c.said for c in said), [c.finish_reason for c in said]


def test_an_answer_ends_before_the_word() -> None:
    said = whole("all is Bad here", "bad")
    assert (said["text"], said["finish_reason"]) == ("all is ", "content_filter")
    assert "logprobs" not in said  # they would say the rest
    assert whole("a badge", "bad")["finish_reason"] == "stop"
    assert whole("very\n  bad", "very bad")["text"] == ""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_a_stream_says_what_the_whole_says_and_no_character_more(size: int) -> None:
    text = "it is a very bad idea to badger it"
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    said, ends = streamed(parts, "very bad", "worse")
    assert said == "it is a "
    assert ends[-1] == "content_filter" and set(ends[:-1]) <= {None}
    assert streamed(parts, "nothing of it")[0] == text
    assert streamed(parts, "nothing of it")[1][-1] == "length"


def test_tool_calls_are_judged_too() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "bad"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    (said,) = asyncio.run(filtered(body, WordFilter(["bad"])))["choices"]
    assert said["finish_reason"] == "content_filter" and "tool_calls" not in said["message"]


def test_settings_name_a_list_or_code(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# a comment\nbad\n\nvery bad\n")
    judge = load(f"words:{words}")
    assert judge is not None and asyncio.run(judge.find("so bad!")) == 3
    assert load("") is None
    made = load("tests.serving.test_content_filter:Quiet")
    assert made is not None and asyncio.run(made.find("any")) is None
    for wrong in ("words:/none", "nowhere:X", "tests.fakes:Nothing", "x"):
        with pytest.raises(InvalidInput, match="INSTRUCTLOOP_CONTENT_FILTER"):
            load(wrong)


class Quiet:
    """Finds nothing."""

    lookahead = 0

    async def find(self, text: str) -> int | None:
        return None
