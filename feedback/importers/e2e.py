"""E2E restaurant descriptions: CSV of meaning representation (mr) and a person's sentence (ref)."""

from contracts.v1 import events_pb2 as pb
from feedback.importers.files import csv_rows
from feedback.importers.row import Format, Raw, Said, author_of, chat, text_of

# Inputs of RankME are inputs of E2E: one id in both, so that the split keeps them together.
AUTHORS = "e2e"
USE_CASE = {"use_case": "generation"}


def prompt_of(raw: Raw) -> pb.Prompt:
    """The meaning representation as it stands, as one turn of a user."""
    return chat(("user", text_of(raw.value["mr"], "mr")))


def _says(raw: Raw) -> list[Said]:
    prompt = prompt_of(raw)
    body = pb.Demonstration(
        prompt=prompt, response=text_of(raw.value["ref"], "ref"), metadata=USE_CASE
    )
    return [Said(author_of(AUTHORS, prompt), body)]


FORMAT = Format(licence="CC-BY-SA-4.0", rows=lambda path: csv_rows(path, ("mr", "ref")), says=_says)
