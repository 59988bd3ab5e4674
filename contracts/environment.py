"""FromEnvironment: settings that an operator gives by variables."""

from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from contracts.errors import InvalidInput
from contracts.fields import fault_in


class FromEnvironment(BaseSettings):
    """A field is set by the variable of its name after the prefix. Raises InvalidInput by the
    variable's name.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as e:
            field, expected, got = fault_in(e)
            raise InvalidInput(self.variable(field), expected, got) from None

    @classmethod
    def variable(cls, field: str) -> str:
        return f"{cls.model_config['env_prefix']}{field}".upper()
