"""Types of fields that serving's and feedback's requests have alike."""

from typing import Annotated

from pydantic import BeforeValidator, Field

# OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# After the bounds of a strict int: as JSON Schema means it, 2.0 is one, "2" and true are none.
WHOLE = BeforeValidator(_whole)
