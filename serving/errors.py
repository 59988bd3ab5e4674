"""Every failure as OpenAI's error body: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.exceptions import HTTPException

from contracts.errors import (
    AccessDenied,
    InvalidInput,
    LimitReached,
    LogUnavailable,
    NotFound,
    Unauthenticated,
)
from contracts.fields import malformed
from contracts.refusal import error_body
from serving.engine import EngineRefused
from serving.gate import CutShort

# How long a client waits before it asks again while the model is loading.
RETRY_AFTER_S = "5"


def engine_error_body(error: EngineRefused) -> dict[str, dict[str, str | None]]:
    """A refusal of the engine; a prompt that is too long has OpenAI's code for it."""
    too_long = error.status == 400 and "maximum context length" in str(error)
    code = "context_length_exceeded" if too_long else None
    return error_body(error.status, str(error), error.param, code)


def install(app: FastAPI, limits: Counter) -> None:
    """Answer every exception of this app in OpenAI's shape. What is not here is a fault, which
    Telemetry answers without repeating its message. Limits that are hit are counted by their kind.
    """
    _install_access(app, limits)
    _install_request(app)
    _install_engine(app)


def _install_access(app: FastAPI, limits: Counter) -> None:
    @app.exception_handler(Unauthenticated)
    def unknown(request: Request, error: Unauthenticated) -> JSONResponse:
        headers = {"www-authenticate": "Bearer"}
        return _response(401, error_body(401, str(error), None, error.code), headers)

    @app.exception_handler(AccessDenied)
    def denied(request: Request, error: AccessDenied) -> JSONResponse:
        return _response(403, error_body(403, str(error), None, error.code))

    @app.exception_handler(LimitReached)
    def limited(request: Request, error: LimitReached) -> JSONResponse:
        limits.labels(error.kind).inc()
        body = error_body(429, str(error), None, "rate_limit_exceeded", error.kind)
        wait = {"retry-after": f"{error.retry_after_s:.0f}"}
        return _response(429, body, {**error.headers, **wait})


def _install_request(app: FastAPI) -> None:
    @app.exception_handler(InvalidInput)
    def invalid(request: Request, error: InvalidInput) -> JSONResponse:
        return _response(400, error_body(400, str(error), error.field))

    @app.exception_handler(RequestValidationError)
    def unfit(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(request, malformed(error.errors()))

    @app.exception_handler(NotFound)
    def not_found(request: Request, error: NotFound) -> JSONResponse:
        code = "model_not_found" if error.field == "model" else "not_found"
        return _response(404, error_body(404, str(error), error.field, code))

    @app.exception_handler(LogUnavailable)
    def unavailable(request: Request, error: LogUnavailable) -> JSONResponse:
        return _response(503, error_body(503, str(error), code="log_unavailable"))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if error.status_code == 404 and detail == "Not Found":
            detail = f"Invalid URL ({request.method} {request.url.path})"
        return _response(
            error.status_code, error_body(error.status_code, detail), error.headers or {}
        )


def _install_engine(app: FastAPI) -> None:
    @app.exception_handler(EngineRefused)
    def refused(request: Request, error: EngineRefused) -> JSONResponse:
        headers = {"retry-after": RETRY_AFTER_S} if error.status == 503 else {}
        return _response(error.status, engine_error_body(error), headers)

    @app.exception_handler(CutShort)
    def cut_short(request: Request, error: CutShort) -> JSONResponse:
        return _response(503, error_body(503, str(error)), {"retry-after": RETRY_AFTER_S})


def _response(
    status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(body, status, headers)
