"""The example messages of the schema: one for each body, written by hand."""

from pathlib import Path

import pytest
from google.protobuf import json_format

from contracts.events import TOPIC_OF, topic_of, validate
from contracts.v1 import events_pb2 as pb

EXAMPLES = Path(__file__).parents[2] / "proto" / "examples" / "v1"


def test_every_body_has_an_example() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.json")} == set(TOPIC_OF)


@pytest.mark.parametrize("body", TOPIC_OF)
def test_an_example_is_valid_and_comes_back_from_the_wire(body: str) -> None:
    text = (EXAMPLES / f"{body}.json").read_text(encoding="utf-8")
    event = json_format.Parse(text, pb.Event())
    validate(event)
    assert topic_of(event) == TOPIC_OF[body]
    assert pb.Event.FromString(event.SerializeToString()) == event


def test_a_misspelt_field_is_refused() -> None:
    text = (EXAMPLES / "consent.json").read_text(encoding="utf-8")
    with pytest.raises(json_format.ParseError, match="noticeVersoin"):
        json_format.Parse(text.replace("noticeVersion", "noticeVersoin"), pb.Event())
