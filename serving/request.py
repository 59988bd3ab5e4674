"""What a request may say: OpenAI's fields that we do, and vLLM's that a client may set.

Every other field is refused by name: silently ignored, it would change the answer unseen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from contracts.errors import InvalidInput
from contracts.fields import Metadata, told_of
from serving.engine import Body, Kind

MAX_CHOICES = 128
SCHEMA_LEVELS, SCHEMA_VALUES = 64, 5_000

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# Of a long list of faults the first one is enough: a body has room for a million.
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]

# OpenAI's, and why we do not do them.
REFUSED = {
    "suffix": "this model does not insert into a text",
    "service_tier": "there is one tier",
    "verbosity": "this model was not trained for it; say it in the prompt",
    "prediction": "there is no speculative decoding by prediction",
    "audio": "this model writes text only",
    "modalities": "this model writes text only",
    "moderation": "there is no moderation on request; the operator's content filter always runs",
    "web_search_options": "this model does not search the web",
    "prompt_cache_key": "prefixes are cached by their tokens, for every request",
    "prompt_cache_options": "prefixes are cached by their tokens, for every request",
    "prompt_cache_retention": "prefixes are cached until memory is needed or the release changes",
    "functions": "tools replace them",
    "function_call": "tool_choice replaces it",
    "reasoning_effort": "this model does not reason in secret",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _compilable(schema: dict[str, Any]) -> dict[str, Any]:
    """A grammar is made of it, in a time that grows faster than the schema."""
    level: list[Any] = [schema]
    levels = values = 0
    while level:
        levels, values = levels + 1, values + len(level)
        if levels > SCHEMA_LEVELS or values > SCHEMA_VALUES:
            bounds = {"levels": SCHEMA_LEVELS, "values": SCHEMA_VALUES}
            told = "Input should have at most {levels} levels and {values} values"
            raise PydanticCustomError("schema_size", told, bounds)
        holders = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in holders for y in (x.values() if isinstance(x, dict) else x)]
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_compilable)]


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(_Part):
    """vLLM's own: the answer is held to exactly one of these."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Annotated[str, Field(max_length=4096)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=128),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(max_length=16_384)] | None = None
    json_object: Literal[True] | None = None


def _beside(field: str, silent: JsonDict, other: str, says: JsonDict) -> JsonDict:
    """In JSON Schema: unless it is `silent`, `field` is there beside an `other` that `says`."""
    without: JsonDict = {"properties": {field: silent}}
    beside: JsonDict = {"required": [other], "properties": {other: says}}
    return {field: {"anyOf": [without, beside]}}


_NULL: JsonDict = {"type": "null"}
_STREAMED = _beside("stream_options", _NULL, "stream", {"const": True})


class Sampled(_Part):
    """What completions and chat share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=64)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    # vLLM's own.
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None


class CompletionRequest(Sampled):
    model_config = ConfigDict(json_schema_extra={"dependentSchemas": _STREAMED})

    prompt: (
        Annotated[str, Field(max_length=1 << 20)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None


class TextPart(_Part):
    type: Literal["text"]
    text: str


class CalledFunction(_Part):
    name: Name
    arguments: str


class ToolCall(_Part):
    id: Annotated[str, Field(min_length=1, max_length=64)]
    type: Literal["function"]
    function: CalledFunction


class Message(_Part):
    """One turn; only text, so that the server fetches nothing that a request names."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                {
                    "required": ["tool_calls"],
                    "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array"}},
                },
            ]
        }
    )

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=64)] | None = None
    # Of an answer that is sent back as OpenAI's client dumps it.
    annotations: None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(_Part):
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(_Part):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(_Part):
    name: Name


class NamedTool(_Part):
    type: Literal["function"]
    function: FunctionName


class TextFormat(_Part):
    type: Literal["text", "json_object"]


class NamedSchema(_Part):
    name: Name
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(_Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(Sampled):
    model_config = ConfigDict(
        json_schema_extra={
            "dependentSchemas": {
                **_STREAMED,
                **_beside("top_logprobs", _NULL, "logprobs", {"const": True}),
                **_beside("tool_choice", {"enum": ["none", None]}, "tools", {"type": "array"}),
            }
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None


REQUEST: dict[Kind, type[Sampled]] = {"completions": CompletionRequest, "chat": ChatRequest}


def parse(raw: bytes) -> Body:
    """A JSON object whose text can be written down again. Says nothing of its content: errors may
    be logged.
    """
    try:
        # Refuses infinities, numbers out of range and halves of surrogate pairs too.
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InvalidInput("body", "valid JSON in UTF-8", "something else") from None
    if not isinstance(body, dict):
        raise InvalidInput("body", "a JSON object", type(body).__name__)
    return body


def checked(kind: Kind, body: Body, max_n: int) -> Body:
    """The fields that say something. Raises InvalidInput for what we do not do as asked."""
    request = REQUEST[kind]
    said = {name: value for name, value in body.items() if value is not None}
    for name in said.keys() - request.model_fields.keys():
        raise InvalidInput(name, *_refusal(name))
    with first_fault(said):
        request.model_validate(said)
    _check_together(kind, said, max_n)
    return said


@contextmanager
def first_fault(said: Body) -> Iterator[Body]:
    """Raises InvalidInput for the fault that says most of a `said` that is validated inside."""
    try:
        yield said
    except ValidationError as e:
        raise _first(e, said) from None


def _refusal(name: str) -> tuple[str, str]:
    if name in REFUSED:
        return f"nothing, for {REFUSED[name]}", "a value"
    return "only arguments that exist", "an unrecognized one"


def _first(error: ValidationError, said: Body) -> InvalidInput:
    """The fault that says most, by the path that leads to it; never with the text that is there."""
    # A value that fits no alternative has a fault for each: the deepest one tells which was meant.
    faults = [
        (_path(fault["loc"], said, missing=fault["type"] == "missing"), fault)
        for fault in error.errors(include_url=False)
    ]
    path, fault = max(faults, key=lambda f: (len(f[0]), not f[1]["type"].endswith("_type")))
    if fault["type"] == "union_tag_invalid":
        path.append("type")
    return InvalidInput(".".join(path) or "body", *told_of(fault))


def _path(loc: Sequence[int | str], value: Any, *, missing: bool) -> list[str]:
    """`loc` without the names of alternatives that pydantic puts into it; a field that is not there
    is the last one.
    """
    path: list[str] = []
    for i, part in enumerate(loc, 1):
        if isinstance(value, dict) and part in value:
            path.append(str(part)[:64])
            value = value[part]
        elif isinstance(value, dict) and i == len(loc) and missing:
            path.append(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(str(part))
            value = value[part]
    return path


def _check_together(kind: Kind, said: Body, max_n: int) -> None:
    """Rules over more than one field, and the operator's bound."""
    n = said.get("n", 1)
    if n > max_n:
        raise InvalidInput("n", f"at most {max_n}, by this server's settings", n)
    if "stream_options" in said and not said.get("stream"):
        without = said.get("stream", "nothing")
        raise InvalidInput("stream_options", "stream to be true with it", without)
    constraints = [v for v in said.get("structured_outputs", {"": 1}).values() if v is not None]
    if len(constraints) != 1:
        raise InvalidInput("structured_outputs", "exactly one constraint", len(constraints))
    if kind == "chat":
        _check_chat(said)
    else:
        _check_completion(said, n, max_n)


def _check_completion(said: Body, n: int, max_n: int) -> None:
    best_of = said.get("best_of", n)
    if not n <= best_of <= max(max_n, n):
        raise InvalidInput("best_of", f"an integer from n = {n} to {max_n}", best_of)
    for other in ("stream", "echo"):
        if best_of > n and said.get(other):
            raise InvalidInput("best_of", f"n or nothing together with {other}", best_of)
    if (choices := best_of * prompts(said.get("prompt"))) > MAX_CHOICES:
        raise InvalidInput("prompt", f"at most {MAX_CHOICES} answers in one request", choices)


def _check_chat(said: Body) -> None:
    if "top_logprobs" in said and not said.get("logprobs"):
        without = said.get("logprobs", "nothing")
        raise InvalidInput("top_logprobs", "logprobs to be true with it", without)
    if said.get("tool_choice", "none") != "none" and "tools" not in said:
        raise InvalidInput("tool_choice", "tools with it", "none")
    for i, message in enumerate(said["messages"]):
        if message.get("content") is None and not (
            message["role"] == "assistant" and message.get("tool_calls")
        ):
            raise InvalidInput(f"messages.{i}.content", "a text", "nothing")


def prompts(prompt: Any) -> int:
    """How many prompts a completion request holds."""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def described(kind: Kind, max_n: int) -> Body:
    """The request body for the OpenAPI document, with every part of it in place."""
    schema = REQUEST[kind].model_json_schema()
    whole = _in_place(schema, schema.pop("$defs"))
    for name in {"n", "best_of"} & whole["properties"].keys():
        integer, _ = whole["properties"][name]["anyOf"]
        integer["maximum"] = min(max_n, integer["maximum"])
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole}}}}


def _in_place(schema: Any, parts: Body) -> Any:
    if isinstance(schema, list):
        return [_in_place(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _in_place(parts[schema["$ref"].removeprefix("#/$defs/")], parts)
    return {name: _in_place(value, parts) for name, value in schema.items() if name != "mapping"}
