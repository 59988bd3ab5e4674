"""Parity where the engine matters: the official client against a real one."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.conftest import VllmServer
from tests.serving.parity import row

# One engine is enough: what differs between tied and untied weights is in test_vllm.py.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.parametrize("vllm_server", [False], ids=["untied"], indirect=True),
]

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Write one", "max_tokens": 4}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Write one"}],
    "max_tokens": 4,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(vllm_server: VllmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{vllm_server.url}/v1", api_key="il-bob", max_retries=0) as opened:
        yield opened


@row(
    "`prompt`, `max_tokens`, `temperature`, `top_p`, penalties, `seed`, `logit_bias`, `echo`",
    openai="text, list of texts, tokens, list of token lists; `max_tokens` 16",
    vllm="yes",
    here="passed on, ranges checked before",
)
def test_sampling_fields_reach_the_engine(client: OpenAI) -> None:
    ask = client.completions.create
    for prompt, answers in (("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)):
        said: Any = prompt
        assert len(ask(model="tiny", prompt=said, max_tokens=2).choices) == answers
    assert ask(model="tiny", prompt="a", extra_body={"ignore_eos": True}).usage is not None
    whole = ask(model="tiny", prompt="a", extra_body={"ignore_eos": True}).usage
    assert whole is not None and whole.completion_tokens == 16
    twice = [ask(**TEXT, seed=7, temperature=1.5, top_p=0.9).choices[0].text for _ in range(2)]
    assert twice[0] == twice[1]
    biased = ask(
        **TEXT, temperature=0, logit_bias={"9": 100}, extra_body={"return_token_ids": True}
    )
    assert biased.choices[0].model_dump()["token_ids"] == [9, 9, 9, 9]
    assert ask(**TEXT, echo=True, user="u").choices[0].text.startswith("Write one")
    ask(**TEXT, presence_penalty=2, frequency_penalty=-2)
    cold: dict[str, Any] = TEXT | {"temperature": 0, "logprobs": 0}
    (likeliest,) = ask(**cold).choices
    for choice in ask(**cold, n=3).choices:
        assert choice.text == likeliest.text
        assert choice.logprobs is not None and likeliest.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(likeliest.logprobs.token_logprobs)


@row(
    "no `prompt`, or an empty one",
    openai="`<|endoftext|>`",
    vllm="400",
    here="the model's token before a text",
)
def test_missing_prompt_begins_a_text(client: OpenAI) -> None:
    ask = client.completions.create
    for prompt in ("", None):
        answer = ask(model="tiny", prompt=prompt, max_tokens=2)
        assert answer.usage is not None and answer.usage.prompt_tokens == 1


@row("`best_of`, by the engine's numbers", openai="as above", vllm="ignored", here="as above")
def test_best_of_ranks_real_samples(client: OpenAI) -> None:
    answer = client.completions.create(**TEXT, n=3, best_of=8, logprobs=0, temperature=2)
    means = []
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        values = [v for v in choice.logprobs.token_logprobs if v is not None]
        means.append(sum(values) / len(values))
    assert means == sorted(means, reverse=True) and len(means) == 3
    assert answer.usage is not None and answer.usage.completion_tokens > 12


@row("`stop`", openai="up to 4", vllm="up to 4, by a variable", here="up to 4 of 256 characters")
def test_stop_ends_an_answer(client: OpenAI) -> None:
    ask = client.completions.create
    greedy: dict[str, Any] = TEXT | {"temperature": 0, "max_tokens": 12}
    text = ask(**greedy).choices[0].text
    stop = text[2:4]
    cut = ask(**greedy, stop=[stop, "never said"]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == text[: text.index(stop)]
    with pytest.raises(openai.BadRequestError):
        ask(**TEXT, stop=["a", "b", "c", "d", "e"])


@row(
    "the body",
    openai="`id`, `object`, `created`, `model`, `choices`, `usage`, `system_fingerprint`",
    vllm="more: `stop_reason`, `token_ids`, `prompt_logprobs`, `kv_transfer_params`, ...",
    here="OpenAI's fields; `system_fingerprint` is the release",
)
def test_body_has_openais_fields_only(client: OpenAI) -> None:
    envelope = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    text = json.loads(client.completions.with_raw_response.create(**TEXT, logprobs=2).text)
    assert text.keys() == envelope and text["id"].startswith("cmpl-")
    assert text["object"] == "text_completion"
    assert text["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert text["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    parts = {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert text["choices"][0]["logprobs"].keys() == parts
    raw = client.chat.completions.with_raw_response.create(**CHAT, logprobs=True, top_logprobs=2)
    chat = json.loads(raw.text)
    assert chat.keys() == envelope and chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


@row(
    "streams, read by the synchronous and the asynchronous client",
    openai="`include_usage`: a last chunk with the usage, null in all others; `[DONE]`",
    vllm="no usage in the others",
    here="as OpenAI; `include_obfuscation` is refused",
)
def test_stream_has_usage_at_its_end(client: OpenAI, vllm_server: VllmServer) -> None:
    usage: Any = {"include_usage": True}
    chunks = list(client.completions.create(**TEXT, stream=True, stream_options=usage))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all("usage" in chunk.model_fields_set for chunk in chunks)
    plain = list(client.completions.create(**TEXT, stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in plain)

    async def read() -> list[Any]:
        url = f"{vllm_server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="il-bob", max_retries=0) as here:
            stream = await here.chat.completions.create(**CHAT, stream=True, stream_options=usage)
            return [chunk async for chunk in stream]

    told = asyncio.run(read())
    assert told[0].choices[0].delta.role == "assistant"
    assert told[-1].usage.completion_tokens <= 4
    hidden: Any = {"include_obfuscation": True}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**TEXT, stream=True, stream_options=hidden)


@row(
    "tools",
    openai="`auto`, `required`, a named function, `none`",
    vllm="with a parser for what the model writes",
    here="as vLLM, with `INSTRUCTLOOP_TOOL_CALL_PARSER`; streamed too; arguments are "
    "held to the function's schema where it is `strict`",
)
def test_tools_are_called(client: OpenAI) -> None:
    """Of eight answers of a model that knows nothing: within the schema some only write spaces."""
    ask = client.chat.completions.create
    named: Any = {"type": "function", "function": {"name": "weather"}}
    long: dict[str, Any] = CHAT | {"tools": [WEATHER], "max_tokens": 120}
    many = long | {"tool_choice": named, "temperature": 1, "n": 8, "seed": 1}
    called = [c.message for c in ask(**many).choices if c.message.tool_calls]
    assert called and {message.content for message in called} == {None}
    calls: list[Any] = [message.tool_calls for message in called]
    for (call,) in calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    said, ended = defaultdict[int, str](str), dict[int, str]()
    for chunk in ask(**many, stream=True):
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                assert part.function is not None and part.function.arguments is not None
                said[choice.index] += part.function.arguments
            ended[choice.index] = choice.finish_reason or ended.get(choice.index, "")
    whole = [said[i] for i, reason in ended.items() if reason != "length"]
    assert whole
    assert {json.loads(arguments)["city"] for arguments in whole} <= {"Rome", "Oslo"}
    assert ask(**long | {"max_tokens": 4}, tool_choice="auto").choices[0].message.role


@row(
    "`response_format`",
    openai="`json_schema`, `json_object`, `text`",
    vllm="the same, and `structured_outputs`",
    here="both; a schema has at most 64 levels and 5,000 values",
)
def test_answers_keep_a_form(client: OpenAI) -> None:
    schema = WEATHER["function"]["parameters"]
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 100}, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Rome", "Oslo")
    only = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert client.completions.create(**TEXT, extra_body=only).choices[0].text in ("yes", "no")
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**CHAT, response_format=wrong)


@row(
    "a prompt that is too long",
    openai="400, code `context_length_exceeded`",
    vllm="400, code 400",
    here="as OpenAI",
)
def test_too_long_a_prompt_has_its_code(client: OpenAI) -> None:
    # By its tokens, and by its characters before there are any.
    for words in (400, 4000):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**TEXT | {"prompt": "Write " * words})
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
