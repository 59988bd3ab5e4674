"""The engine's bodies as OpenAI's: only its fields, and best_of's choice among the samples."""

from typing import Any, Literal

from msgspec import UNSET
from pydantic import BaseModel

from contracts.release import Release
from serving.chunk import Chunk
from serving.engine import Body, Kind

# What OpenAI's whole bodies have; the engine's own extras stay inside.
FIELDS = ("id", "object", "created", "model", "choices", "usage")
# And `release`, ours, where the choices are of several.
CHOICE_FIELDS = ("index", "text", "message", "logprobs", "finish_reason", "release")
TOKEN_FIELDS = ("token_ids", "prompt_token_ids")
MESSAGE_FIELDS = ("role", "content", "refusal")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Completed(BaseModel):
    """What both bodies have. These are for the OpenAPI document, which says what is always there;
    a body itself is put together by `public`.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class TextCompletion(Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatCompletion(Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


BODY: dict[Kind, type[Completed]] = {"completions": TextCompletion, "chat": ChatCompletion}


def documented(kind: Kind) -> dict[int | str, Body]:
    """The responses for the OpenAPI document: a body, or its chunks as server-sent events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {
        200: {
            "model": BODY[kind],
            "description": "OpenAI's object; with stream, its chunks, and [DONE].",
            "content": {"text/event-stream": {"itemSchema": event}},
        }
    }


def public(body: Body, release: Release, *, token_ids: bool) -> Body:
    """A body as the client gets it."""
    said = {name: body[name] for name in FIELDS if name in body}
    said["model"] = release.model
    said["choices"] = [_choice(choice, token_ids) for choice in body["choices"]]
    said["usage"] = {name: n for name, n in body["usage"].items() if n is not None}
    said["system_fingerprint"] = release.id
    return said


def make_public(chunk: Chunk, release: Release, *, token_ids: bool, usage: bool) -> None:
    """Turn a chunk, which had the engine's fields dropped when it was read, into what the client
    gets; `usage` null where it is asked for and not known.
    """
    chunk.model, chunk.system_fingerprint = release.model, release.id
    for choice in chunk.choices:
        if not token_ids:
            choice.token_ids = choice.prompt_token_ids = UNSET
        for call in choice.delta.tool_calls if choice.delta else ():
            if "name" in (function := call.get("function") or {}):
                function.setdefault("arguments", "")  # for a client to add the others to
    chunk.usage = (chunk.usage or None) if usage else UNSET


def _choice(choice: Body, token_ids: bool) -> Body:
    fields = CHOICE_FIELDS + (TOKEN_FIELDS if token_ids else ())
    said = {name: choice[name] for name in fields if name in choice}
    if "message" in said:
        said["message"] = _message(said["message"])
    said.setdefault("logprobs", None)
    said.setdefault("finish_reason", None)
    return said


def _message(message: Body) -> Body:
    said = {name: message[name] for name in MESSAGE_FIELDS if name in message}
    if calls := message.get("tool_calls"):
        said |= {"tool_calls": calls, "content": said.get("content") or None}
    return said


def best(body: Body, n: int, best_of: int, logprobs: bool) -> Body:
    """For each prompt the `n` of its `best_of` samples with the highest mean log-probability of a
    token, best first. OpenAI's best_of, which vLLM gave up; ties go to the sample that came first.
    """
    choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
    chosen: list[Body] = []
    for start in range(0, len(choices), best_of):
        ranked = sorted(choices[start : start + best_of], key=_mean_logprob, reverse=True)
        chosen += ranked[:n]
    kept = [
        choice | {"index": i, "logprobs": choice["logprobs"] if logprobs else None}
        for i, choice in enumerate(chosen)
    ]
    return body | {"choices": kept}


def _mean_logprob(choice: Body) -> float:
    values = [v for v in choice["logprobs"]["token_logprobs"] if v is not None]
    return sum(values) / len(values) if values else float("-inf")
