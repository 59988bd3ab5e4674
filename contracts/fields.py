"""Fields: types that serving's and feedback's requests have alike, and what is wrong with one."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from contracts.errors import InvalidInput

AT_ODDS = "at_odds"
# How pydantic begins to say what it wants of an input, a list, a string.
_SHOULD = re.compile(r"^\w+ should (?:be |have )?")

# OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# After the bounds of a strict int: as JSON Schema means it, 2.0 is one, "2" and true are none.
WHOLE = BeforeValidator(_whole)


def at_odds(field: str, expected: str, got: object) -> PydanticCustomError:
    """For a model's validator to raise: a field that does not go with others of the model."""
    told = {"field": field, "expected": expected, "got": got}
    return PydanticCustomError(AT_ODDS, "{field}: expected {expected}, got {got}", told)


def told_of(fault: Mapping[str, Any]) -> tuple[str, object]:
    """Of one of pydantic's faults: what was expected, and what came, without any text of it."""
    kind, value = fault["type"], fault["input"]
    if kind == "missing":
        return "a value", "nothing"
    if kind == "extra_forbidden":
        return "only arguments that exist", "an unrecognized one"
    if kind == "union_tag_invalid":
        return fault["ctx"]["expected_tags"], "another"
    expected = _SHOULD.sub("", fault["msg"]).partition(" after validation")[0]
    if kind.endswith(("too_long", "too_short")):
        return expected, len(value)
    if isinstance(value, bool | int | float):
        return expected, value
    fits = kind in ("literal_error", "string_pattern_mismatch") and isinstance(value, str)
    return expected, "another" if fits else type(value).__name__


def malformed(faults: Sequence[Mapping[str, Any]]) -> InvalidInput:
    """What FastAPI found wrong with a request, by its first fault."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return InvalidInput("body", "valid JSON in UTF-8", "something else")
    place, *path = fault["loc"]
    if place == "header":
        del path[1:]  # the name is followed by those of pydantic's alternatives
    if not path:
        got = "nothing" if fault["type"] == "missing" else type(fault["input"]).__name__
        return InvalidInput("body", "a JSON object, sent as application/json", got)
    return InvalidInput(".".join(str(part) for part in path), *told_of(fault))


def fault_in(error: ValidationError) -> tuple[str, str, object]:
    """Of the first field that is wrong: its path with dots, what was expected, what came."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == AT_ODDS:
        told = fault["ctx"]
        return ".".join([*path, told["field"]]), told["expected"], told["got"]
    field = ".".join(path)
    if fault["type"] == "missing":
        return field, "a value", "nothing"
    if fault["type"] == "extra_forbidden":
        return field, "a name that exists", "an unknown one"
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("String should match ")
    return field, expected[:1].lower() + expected[1:], fault["input"]
