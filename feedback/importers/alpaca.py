"""Alpaca: JSON (an array or lines) of instruction, optional input, and output."""

from contracts.errors import InvalidInput
from contracts.v1 import events_pb2 as pb
from feedback.importers.files import json_items
from feedback.importers.row import Format, Raw, Said, author_of, chat, text_of


def _says(raw: Raw) -> list[Said]:
    asked = text_of(raw.value.get("instruction"), "instruction")
    given = raw.value.get("input", "")
    if not isinstance(given, str):
        raise InvalidInput("input", "a text, or none", type(given).__name__)
    if given.strip():
        asked = f"{asked}\n\n{text_of(given, 'input')}"
    prompt = chat(("user", asked))
    body = pb.Demonstration(prompt=prompt, response=text_of(raw.value.get("output"), "output"))
    return [Said(author_of("alpaca", prompt), body)]


FORMAT = Format(licence="CC-BY-NC-4.0", rows=json_items, says=_says)
