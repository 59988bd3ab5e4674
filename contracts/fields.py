"""Fields: types that serving's and feedback's requests have alike, and what is wrong with one."""

from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

AT_ODDS = "at_odds"

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
