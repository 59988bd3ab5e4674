"""The example messages of the schema: BODY.json for each body, or BODY.WHAT.json for another of it,
written by hand.
"""

from pathlib import Path

import pytest
from google.protobuf import json_format

from contracts.events import TOPIC_OF, topic_of, validate
from contracts.v1 import events_pb2 as pb

EXAMPLES = Path(__file__).parents[2] / "proto" / "examples" / "v1"
FILES = sorted(EXAMPLES.glob("*.json"))


def test_every_body_has_an_example() -> None:
    assert {file.name.split(".")[0] for file in FILES} == set(TOPIC_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid_and_comes_back_from_the_wire(file: Path) -> None:
    event = json_format.Parse(file.read_text(encoding="utf-8"), pb.Event())
    validate(event)
    assert topic_of(event) == TOPIC_OF[file.name.split(".")[0]]
    assert pb.Event.FromString(event.SerializeToString()) == event


def test_a_misspelt_field_is_refused() -> None:
    text = (EXAMPLES / "consent.json").read_text(encoding="utf-8")
    with pytest.raises(json_format.ParseError, match="noticeVersoin"):
        json_format.Parse(text.replace("noticeVersion", "noticeVersoin"), pb.Event())
