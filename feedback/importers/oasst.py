"""OpenAssistant: JSON lines of message trees, in which volunteers ranked the answers."""

from collections.abc import Iterator
from typing import Any

from contracts.errors import InvalidInput
from contracts.events import MAX_RANKED, MIN_RANKED
from contracts.v1 import events_pb2 as pb
from feedback.importers.files import json_lines
from feedback.importers.row import (
    Format,
    Raw,
    Said,
    author_of,
    chat,
    digest,
    groups_by,
    in_neutral_order,
    outputs,
    text_of,
)

_ROLE = {"prompter": "user", "assistant": "assistant"}
INSTRUCTIONS = "oasst"
Turns = tuple[tuple[str, str], ...]


def _says(raw: Raw) -> list[Said]:
    """Every set of two or more ranked answers in the tree, as a completion and its ranking."""
    return list(_walk(raw.value.get("prompt"), ()))


def _walk(node: Any, before: Turns) -> Iterator[Said]:
    if not isinstance(node, dict):
        raise InvalidInput("message", "an object", type(node).__name__)
    role, replies = node.get("role"), node.get("replies") or []
    if not isinstance(role, str) or role not in _ROLE or not isinstance(replies, list):
        raise InvalidInput("message", "a role of prompter or assistant and a list of replies", role)
    turns = (*before, (_ROLE[role], text_of(node.get("text"), "text")))
    if role == "prompter":
        yield from _ranked(turns, replies)
    for reply in replies:
        yield from _walk(reply, turns)


def _ranked(turns: Turns, replies: list[Any]) -> Iterator[Said]:
    """Merged from several volunteers who are not named, so a conversation is its own rater."""
    ranks = dict(_text_and_rank(reply) for reply in replies if _is_ranked(reply))
    if len(ranks) < MIN_RANKED:
        return
    if len(ranks) > MAX_RANKED:
        raise InvalidInput("replies", f"at most {MAX_RANKED} ranked answers", len(ranks))
    prompt, texts = chat(*turns), in_neutral_order(ranks)
    asked = "\0".join((*(content for _, content in turns), *texts))
    completion = pb.Completion(
        completion_id=f"oasst-{digest(asked)[:24]}",
        prompt=prompt,
        outputs=outputs(texts),
    )
    ranking = pb.Ranking(
        completion_id=completion.completion_id,
        groups=groups_by({i: ranks[t] for i, t in enumerate(texts)}, highest_first=False),
        instruction_version=INSTRUCTIONS,
    )
    user_id = author_of("oasst", prompt)
    yield Said(user_id, completion)
    yield Said(user_id, ranking)


def _is_ranked(reply: Any) -> bool:
    return (
        isinstance(reply, dict)
        and reply.get("role") == "assistant"
        and reply.get("rank") is not None
        and not reply.get("deleted")
    )


def _text_and_rank(reply: dict[str, Any]) -> tuple[str, int]:
    rank = reply["rank"]
    if not isinstance(rank, int):
        raise InvalidInput("rank", "an integer, 0 for the best", type(rank).__name__)
    return text_of(reply.get("text"), "text"), rank


FORMAT = Format(licence="Apache-2.0", rows=json_lines, says=_says)
