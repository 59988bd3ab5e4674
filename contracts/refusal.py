"""Refusals as OpenAI's error body: what serving and feedback answer, and document, alike."""

from typing import Any

from pydantic import BaseModel


class Refusal(BaseModel):
    """Why, and of which kind; `param` is the field at fault, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class RefusalBody(BaseModel):
    """What is answered in place of a result."""

    error: Refusal


# For the OpenAPI document, of every operation.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": RefusalBody, "description": "Refused; the error says why."},
    "5XX": {"model": RefusalBody, "description": "Not possible now; it may be asked again."},
}


def error_body(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
) -> dict[str, dict[str, str | None]]:
    """The body for a status, whose kind it says by default."""
    kind = kind or _kind(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _kind(status: int) -> str:
    if status == 403:
        return "permission_error"
    return "server_error" if status >= 500 else "invalid_request_error"
