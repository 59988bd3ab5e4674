"""HH-RLHF: JSON lines of two dialogues that differ in the last answer; `chosen` is the better."""

import re

from contracts.errors import InvalidInput
from contracts.v1 import events_pb2 as pb
from feedback.importers.files import json_lines
from feedback.importers.row import (
    Format,
    Raw,
    Said,
    author_of,
    chat,
    digest,
    in_neutral_order,
    outputs,
    text_of,
)

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
INSTRUCTIONS = "hh"


def _says(raw: Raw) -> list[Said]:
    (turns, chosen), (other_turns, rejected) = (
        _dialogue(text_of(raw.value.get(field), field), field) for field in ("chosen", "rejected")
    )
    if turns != other_turns:
        raise InvalidInput("chosen, rejected", "the same turns up to the last answer", "others")
    if chosen == rejected:
        raise InvalidInput("chosen, rejected", "two answers that differ", "the same answer")
    prompt = chat(*turns)
    texts = in_neutral_order((chosen, rejected))
    completion = pb.Completion(
        completion_id=f"hh-{digest(raw.content)[:24]}",
        prompt=prompt,
        outputs=outputs(texts),
    )
    ranking = pb.Ranking(
        completion_id=completion.completion_id,
        groups=[pb.RankGroup(outputs=[texts.index(text)]) for text in (chosen, rejected)],
        instruction_version=INSTRUCTIONS,
    )
    # The files do not say who preferred, so a conversation is its own rater.
    user_id = author_of("hh", prompt)
    return [Said(user_id, completion), Said(user_id, ranking)]


def _dialogue(text: str, field: str) -> tuple[list[tuple[str, str]], str]:
    """The turns before the last answer, and that answer."""
    head, *parts = _TURN.split(text)
    turns = [(_ROLE[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if (
        head
        or not turns
        or len(turns) % 2
        or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns))
    ):
        raise InvalidInput(field, "Human and Assistant in turn, an answer last", "another order")
    if not all(said for _, said in turns):
        raise InvalidInput(field, "words in every turn", "an empty turn")
    return turns[:-1], turns[-1][1]


FORMAT = Format(licence="MIT", rows=json_lines, says=_says)
