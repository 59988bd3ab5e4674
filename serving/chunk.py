"""Chunk: one part of a streamed answer; only what OpenAI's chunks have, and token ids.

The decoder does not build what is not here, so that the engine's own extras stay inside, and
typed, since a stream has one for every token and dictionaries take longer both ways.
"""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

# Not there unless they are asked for.
TokenIds = list[int] | UnsetType | None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a message goes on with."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    tool_calls: list[dict[str, Any]] = []


class Choice(msgspec.Struct):
    """A part of one answer: of a completion its text, of a chat its delta."""

    index: int
    text: str | UnsetType | None = UNSET
    delta: Delta | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    token_ids: TokenIds = UNSET
    prompt_token_ids: TokenIds = UNSET

    @property
    def said(self) -> str:
        return (self.delta.content if self.delta else self.text) or ""


class Chunk(msgspec.Struct):
    """Without choices it tells the usage."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, Any] | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType | None = UNSET
