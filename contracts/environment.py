"""FromEnvironment: settings that an operator gives by variables."""

from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from contracts.errors import InvalidInput


class FromEnvironment(BaseSettings):
    """A field is set by the variable of its name after the prefix. Raises InvalidInput by the
    variable's name.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as e:
            fault = e.errors(include_url=False)[0]
            expected = fault["msg"].removeprefix("Input should be ")
            raise InvalidInput(
                self.variable(str(fault["loc"][0])),
                expected[:1].lower() + expected[1:],
                fault["input"],
            ) from None

    @classmethod
    def variable(cls, field: str) -> str:
        return f"{cls.model_config['env_prefix']}{field}".upper()
