"""Every failure as OpenAI's error body: {"error": {"message", "type", "param", "code"}}."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from contracts.errors import AccessDenied, InvalidInput, LogUnavailable, NotFound
from serving.engine import EngineRefused
from serving.gate import CutShort

log = logging.getLogger(__name__)

# How long a client waits before it asks again while the model is loading.
RETRY_AFTER_S = "5"


def error_body(
    status: int, message: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    return {
        "error": {
            "message": message,
            "type": _type(status),
            "param": param,
            "code": _code(status, param),
        }
    }


def install(app: FastAPI) -> None:
    """Answer every exception of this app in OpenAI's shape. A message that is not ours is not
    repeated.
    """

    @app.exception_handler(AccessDenied)
    def denied(request: Request, error: AccessDenied) -> JSONResponse:
        return _response(401, str(error))

    @app.exception_handler(InvalidInput)
    def invalid(request: Request, error: InvalidInput) -> JSONResponse:
        return _response(400, str(error), error.field)

    @app.exception_handler(NotFound)
    def not_found(request: Request, error: NotFound) -> JSONResponse:
        return _response(404, str(error), "model")

    @app.exception_handler(LogUnavailable)
    def unavailable(request: Request, error: LogUnavailable) -> JSONResponse:
        return _response(503, str(error))

    @app.exception_handler(EngineRefused)
    def refused(request: Request, error: EngineRefused) -> JSONResponse:
        return _response(error.status, str(error), error.param)

    @app.exception_handler(CutShort)
    def cut_short(request: Request, error: CutShort) -> JSONResponse:
        return _response(503, str(error))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        return _response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
        return _response(500, "The server had an error while processing your request.")


def _response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"retry-after": RETRY_AFTER_S} if status == 503 else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param), status, headers)


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def _code(status: int, param: str | None) -> str | None:
    if status == 401:
        return "invalid_api_key"
    if status == 404 and param == "model":
        return "model_not_found"
    return None
