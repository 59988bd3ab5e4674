"""The feedback service: consent and rankings over HTTP, and the Playground's pages. Wiring only."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Scope

from contracts.access import Authenticate, ConsentReader, Principal
from contracts.errors import AccessDenied, InvalidInput, LogUnavailable, NotFound
from contracts.events import Stamper
from contracts.log import EventSink, EventSource
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.consent import PURPOSES, ConsentState
from feedback.intake import Intake, Judgement
from feedback.rights import Rights

_STAMPER = Stamper("feedback")
PAGES = Path(__file__).parent / "ui"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Text = Annotated[str, Field(min_length=1, max_length=256)]


class ConsentRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    granted: StrictBool
    notice_version: Text
    # All where empty.
    purposes: Annotated[tuple[Literal["training", "evaluation", "reading"], ...], Field()] = ()
    # With granted=false: nobody can read again what was sent before.
    erase: StrictBool = False


class RankingRequest(BaseModel):
    """`groups` are output indices, best first; outputs in one group are equally good."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    completion_id: Text
    groups: Annotated[
        tuple[tuple[Annotated[int, Field(strict=True)], ...], ...], Field(max_length=9)
    ]
    instruction_version: Text
    seconds_spent: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    # OpenAI's bounds on metadata.
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=16),
    ] = {}


def create_app(
    *,
    sink: EventSink,
    source: EventSource,
    authenticate: Authenticate,
    consent: ConsentReader,
    stamper: Stamper = _STAMPER,
    rights: Rights | None = None,
) -> FastAPI:
    """Every API route asks `authenticate` itself.

    Routes are plain functions, so that appends run in threads, off the event loop.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    intake = Intake(sink, source, consent, stamper)

    def principal(authorization: Annotated[str | None, Header()] = None) -> Principal:
        try:
            return authenticate(authorization)
        except AccessDenied as e:
            raise HTTPException(401, str(e), {"WWW-Authenticate": "Bearer"}) from e

    Who = Annotated[Principal, Depends(principal)]

    _add_consent(app, rights or Rights(sink, source, None, stamper), principal)

    @app.post("/v1/feedback/rankings")
    def post_ranking(
        who: Who,
        body: RankingRequest,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
        x_instructloop_source: Annotated[Literal["playground"] | None, Header()] = None,
    ) -> dict[str, object]:
        judgement = Judgement(
            completion_id=body.completion_id,
            groups=body.groups,
            instruction_version=body.instruction_version,
            seconds_spent=body.seconds_spent,
            metadata=body.metadata,
            source=pb.SOURCE_PLAYGROUND if x_instructloop_source else pb.SOURCE_API,
        )
        event_id = intake.rank(who, judgement, idempotency_key)
        return {
            "object": "ranking",
            "id": event_id,
            "completion_id": body.completion_id,
            "groups": body.groups,
        }

    _answer_errors(app)
    app.mount("/", _Pages(directory=PAGES, html=True))
    return app


def _add_consent(app: FastAPI, rights: Rights, principal: Callable[..., Principal]) -> None:
    """What the caller agreed to and takes back, what became of their data, and all of it."""
    Who = Annotated[Principal, Depends(principal)]

    @app.get("/v1/consent")
    def get_consent(who: Who) -> dict[str, object]:
        return _consent_object(who.user_id, rights.state(who.user_id))

    @app.put("/v1/consent")
    def put_consent(who: Who, body: ConsentRequest) -> dict[str, object]:
        if body.granted and body.notice_version != notice.CURRENT.version:
            expected = f"the current version, {notice.CURRENT.version}"
            raise InvalidInput("notice_version", expected, body.notice_version)
        if body.granted and body.erase:
            raise InvalidInput("erase", "false where consent is granted", True)
        if not body.granted and (body.erase or _changes(rights, who.user_id, body)):
            rights.withdraw(who.user_id, body.purposes, erase=body.erase)
        elif body.granted and _changes(rights, who.user_id, body):
            rights.grant(who.user_id, body.notice_version, body.purposes)
        return _consent_object(who.user_id, rights.state(who.user_id))

    @app.get("/v1/consent/report")
    def get_report(who: Who) -> dict[str, Any]:
        return rights.report(who.user_id)

    @app.get("/v1/consent/export")
    def get_export(who: Who) -> dict[str, Any]:
        return rights.export(who.user_id)


def _changes(rights: Rights, user_id: str, body: ConsentRequest) -> bool:
    """Whether it is anything new; as long as nobody knows, it is."""
    named: Collection[str] = body.purposes or PURPOSES
    try:
        state = rights.state(user_id)
    except LogUnavailable:
        return True
    if body.granted:
        return not state.has(body.notice_version, named)
    return not set(named).isdisjoint(state.purposes)


class _Pages(StaticFiles):
    """The packed pages, and nothing that they did not bring may run in them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response


def _consent_object(user_id: str, state: ConsentState) -> dict[str, object]:
    return {
        "object": "consent",
        "user_id": user_id,
        "granted": state.granted is not None,
        "notice_version": state.granted,
        "purposes": state.purposes,
        "notice": {"version": notice.CURRENT.version, "text": notice.CURRENT.text},
    }


def _answer_errors(app: FastAPI) -> None:
    """Every refusal in the shape of OpenAI's errors."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = first["loc"][1:] if first["type"] != "json_invalid" else ()
        param = ".".join(str(part) for part in where) or None
        return _refusal(400, f"{param or 'body'}: {first['msg']}", param)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        code = "invalid_api_key" if error.status_code == 401 else None
        return _refusal(error.status_code, error.detail, None, code, error.headers)

    answers: list[tuple[type[Exception], int, str | None]] = [
        (InvalidInput, 400, None),
        (AccessDenied, 403, "consent_required"),
        (NotFound, 404, "not_found"),
        (LogUnavailable, 503, "log_unavailable"),
    ]

    # The server prints the traceback; the caller gets no part of it.
    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return _refusal(500, "the server failed; the request may be repeated", None)

    for kind, status, code in answers:
        app.exception_handler(kind)(_answer(status, code))


def _answer(
    status: int, code: str | None
) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        return _refusal(status, str(error), getattr(error, "field", None), code)

    return answer


def _refusal(
    status: int,
    message: str,
    param: str | None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = {403: "permission_error", 500: "server_error", 503: "server_error"}.get(
        status, "invalid_request_error"
    )
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, dict(headers or {}))
