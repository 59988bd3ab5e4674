"""What one row of a public file says, before it becomes events."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InvalidInput
from contracts.v1 import events_pb2 as pb


@dataclass(frozen=True)
class Raw:
    """A row as its file holds it: a CSV record, a line of JSON, an item of a JSON array."""

    # The line on which it ends, or the item's number in a JSON array; from 1.
    row: int
    # What tells it from other rows.
    content: str
    # Its columns or its JSON value.
    value: Any


@dataclass(frozen=True)
class BadRow:
    """A row that was left out. The reason holds none of its text."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Said:
    """One body that a row holds, and whose it is; the importer fills in source and notice."""

    user_id: str
    body: pb.Completion | pb.Ranking | pb.Demonstration
    # Seconds since 1970; 0 where the file does not say.
    at: float = 0.0


@dataclass(frozen=True)
class Format:
    """One public format. `says` raises InvalidInput for a malformed row."""

    # SPDX id of the published data, or "unclear"; taken where the caller gives none.
    licence: str
    rows: Callable[[Path], Iterator[Raw | BadRow]]
    says: Callable[[Raw], list[Said]]


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    """A prompt of (role, content) turns."""
    return pb.Prompt(messages=[pb.Message(role=role, content=content) for role, content in turns])


def author_of(format: str, prompt: pb.Prompt) -> str:
    """A user id for a prompt without a known author: equal for what begins with the same message.

    So the split by user keeps a prompt, and a conversation with its continuations, on one side.
    """
    return f"{format}:{digest(prompt.messages[0].content)[:12]}"


def outputs(texts: Iterable[str]) -> list[pb.Output]:
    return [pb.Output(index=i, text=t, finish_reason="stop") for i, t in enumerate(texts)]


def in_neutral_order(texts: Iterable[str]) -> list[str]:
    """The same texts in an order that says nothing about their rank: by their digests."""
    return sorted(texts, key=digest)


def groups_by(scores: Mapping[int, float], *, highest_first: bool) -> list[pb.RankGroup]:
    """Output indices by score, best group first; equal scores are ties."""
    levels = sorted(set(scores.values()), reverse=highest_first)
    return [pb.RankGroup(outputs=[i for i in sorted(scores) if scores[i] == s]) for s in levels]


def text_of(value: Any, field: str) -> str:
    """`value` as a text with something in it. Raises InvalidInput."""
    if not isinstance(value, str):
        raise InvalidInput(field, "a text", "nothing" if value is None else type(value).__name__)
    if not value.strip():
        raise InvalidInput(field, "a text", "an empty one")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, "text in UTF-8", "other bytes") from None
    return value


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
