"""The feedback service: consent, feedback and stored completions over HTTP, and the pages."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Scope

from contracts.access import Authenticate, ConsentReader, Principal
from contracts.errors import (
    AccessDenied,
    InvalidInput,
    LimitReached,
    LogUnavailable,
    NotFound,
    Unauthenticated,
)
from contracts.events import MAX_SCORE, MIN_SCORE, Stamper
from contracts.fields import WHOLE, Metadata, malformed
from contracts.log import EventSink, EventSource
from contracts.refusal import DOCUMENTED, error_body
from contracts.v1 import events_pb2 as pb
from feedback import notice, stored
from feedback.completions import Completions
from feedback.consent import PURPOSES, ConsentState
from feedback.intake import Intake
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

# For the document alone: who asks is for `authenticate` to say.
_KEY = HTTPBearer(scheme_name="key", description="An API key.", auto_error=False)

Text = Annotated[str, Field(min_length=1, max_length=256)]
# Repeated, a request with the same key is the same event; and where it was made.
Key = Annotated[
    str | SkipJsonSchema[None], Header(alias="Idempotency-Key", min_length=1, max_length=256)
]
Page = Annotated[
    Literal["playground"] | SkipJsonSchema[None], Header(alias="X-Instructloop-Source")
]


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


class ConsentRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    granted: StrictBool
    notice_version: Text
    # All where empty.
    purposes: Annotated[tuple[Literal["training", "evaluation", "reading"], ...], Field()] = ()
    # With granted=false: nobody can read again what was sent before.
    erase: StrictBool = False


class About(BaseModel):
    """What every kind of feedback says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    completion_id: Text
    metadata: Metadata = {}


Index = Annotated[int, Field(strict=True, ge=0, lt=1 << 32), WHOLE]
Words = Annotated[str, Field(min_length=1, max_length=65_536, pattern=r"\S")]


class RankingRequest(About):
    """`groups` are output indices, best first; outputs in one group are equally good."""

    model_config = _example(
        completion_id="cmpl-5b1f0c", groups=[[0], [2, 1]], instruction_version="1"
    )

    groups: Annotated[tuple[tuple[Index, ...], ...], Field(max_length=9)]
    instruction_version: Text
    seconds_spent: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class RatingRequest(About):
    """One output by itself, from 1, very bad, to 7, excellent."""

    model_config = _example(
        completion_id="cmpl-5b1f0c", output=0, score=6, metadata={"hallucinates": "false"}
    )

    output: Index
    score: Annotated[int, Field(strict=True, ge=MIN_SCORE, le=MAX_SCORE), WHOLE]


class EditRequest(About):
    """One output as the person would have written it."""

    model_config = _example(completion_id="cmpl-5b1f0c", output=0, text="Owls hunt at night.")

    output: Index
    text: Words


class CommentRequest(About):
    """Words about a completion, or about one output of it."""

    model_config = _example(completion_id="cmpl-5b1f0c", text="The second one made up a source.")

    output: Index | None = None
    text: Words


def create_app(
    *,
    sink: EventSink,
    source: EventSource,
    authenticate: Authenticate,
    consent: ConsentReader,
    stamper: Stamper = _STAMPER,
    rights: Rights | None = None,
) -> FastAPI:
    """Every API route asks for a key with the scope feedback: the app itself depends on one.

    Routes are plain functions, so that appends run in threads, off the event loop.
    """

    def principal(request: Request, _: Annotated[object, Depends(_KEY)]) -> Principal:
        who = authenticate(request.headers.get("authorization"))
        if "feedback" not in who.scopes:
            raise AccessDenied(
                "You have insufficient permissions for this operation. Missing scopes: feedback.",
                "missing_scope",
            )
        return who

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(principal)],
        responses=DOCUMENTED,
    )
    completions = Completions(source)
    intake = Intake(sink, source, completions, consent, stamper)
    Who = Annotated[Principal, Depends(principal)]

    _add_consent(app, rights or Rights(sink, source, None, stamper), principal)

    _add_feedback(app, intake, Who)
    app.include_router(stored.router(completions, sink, stamper, principal))
    _answer_errors(app)
    app.mount("/", _Pages(directory=PAGES, html=True))
    return app


def _add_feedback(app: FastAPI, intake: Intake, Who: Any) -> None:
    """What a person says about a completion of theirs."""

    @app.post("/v1/feedback/rankings")
    def post_ranking(
        who: Who, body: RankingRequest, key: Key = None, page: Page = None
    ) -> dict[str, object]:
        ranking = pb.Ranking(
            completion_id=body.completion_id,
            groups=[pb.RankGroup(outputs=group) for group in body.groups],
            instruction_version=body.instruction_version,
            seconds_spent=body.seconds_spent,
            source=_source(page),
            metadata=body.metadata,
        )
        return _taken("ranking", intake.take(who, ranking, key), body, "groups")

    @app.post("/v1/feedback/ratings")
    def post_rating(
        who: Who, body: RatingRequest, key: Key = None, page: Page = None
    ) -> dict[str, object]:
        rating = pb.Rating(**body.model_dump(), source=_source(page))
        return _taken("rating", intake.take(who, rating, key), body, "output", "score")

    @app.post("/v1/feedback/edits")
    def post_edit(
        who: Who, body: EditRequest, key: Key = None, page: Page = None
    ) -> dict[str, object]:
        edit = pb.Edit(**body.model_dump(), source=_source(page))
        return _taken("edit", intake.take(who, edit, key), body, "output")

    @app.post("/v1/feedback/comments")
    def post_comment(
        who: Who, body: CommentRequest, key: Key = None, page: Page = None
    ) -> dict[str, object]:
        comment = pb.Comment(**body.model_dump(), source=_source(page))
        return _taken("comment", intake.take(who, comment, key), body, "output")


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
        if not body.granted:  # also where nothing seems granted: not all may be known here
            rights.withdraw(who.user_id, body.purposes, erase=body.erase)
        elif _is_new(rights, who.user_id, body):
            rights.grant(who.user_id, body.notice_version, body.purposes)
        return _consent_object(who.user_id, rights.state(who.user_id))

    @app.get("/v1/consent/report")
    def get_report(who: Who) -> dict[str, Any]:
        return rights.report(who.user_id)

    @app.get("/v1/consent/export")
    def get_export(who: Who) -> dict[str, Any]:
        return rights.export(who.user_id)


def _is_new(rights: Rights, user_id: str, body: ConsentRequest) -> bool:
    """Whether this was not agreed to yet; as long as nobody knows, it was not."""
    named: Collection[str] = body.purposes or PURPOSES
    try:
        state = rights.state(user_id)
    except LogUnavailable:
        return True
    return not state.has(body.notice_version, named)


class _Pages(StaticFiles):
    """The packed pages, and nothing that they did not bring may run in them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path == "v1" or path.startswith("v1/"):  # an API's path that no route took
            raise StarletteHTTPException(404, f"Invalid URL ({scope['method']} {scope['path']})")
        if scope["method"] not in {"GET", "HEAD"}:
            raise StarletteHTTPException(405, "A page is read only", {"allow": "GET, HEAD"})
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response


def _source(page: str | None) -> pb.Source:
    return pb.SOURCE_PLAYGROUND if page else pb.SOURCE_API


def _taken(kind: str, event_id: str, body: About, *fields: str) -> dict[str, object]:
    said = {name: getattr(body, name) for name in fields}
    return {"object": kind, "id": event_id, "completion_id": body.completion_id, **said}


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
    async def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        fault = malformed(error.errors())
        return _refusal(400, str(fault), fault.field)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _refusal(error.status_code, error.detail, None, None, error.headers)

    @app.exception_handler(Unauthenticated)
    async def unknown(_: Request, error: Unauthenticated) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"}
        return _refusal(401, str(error), None, error.code, headers)

    @app.exception_handler(AccessDenied)
    async def denied(_: Request, error: AccessDenied) -> JSONResponse:
        return _refusal(403, str(error), None, error.code)

    @app.exception_handler(LimitReached)
    async def limited(_: Request, error: LimitReached) -> JSONResponse:
        headers = {**error.headers, "Retry-After": f"{error.retry_after_s:.0f}"}
        return _refusal(429, str(error), None, "rate_limit_exceeded", headers, error.kind)

    @app.exception_handler(InvalidInput)
    async def invalid(_: Request, error: InvalidInput) -> JSONResponse:
        return _refusal(400, str(error), error.field)

    @app.exception_handler(NotFound)
    async def not_found(_: Request, error: NotFound) -> JSONResponse:
        return _refusal(404, str(error), error.field, "not_found")

    @app.exception_handler(LogUnavailable)
    async def away(_: Request, error: LogUnavailable) -> JSONResponse:
        return _refusal(503, str(error), None, "log_unavailable")

    # The server prints the traceback; the caller gets no part of it.
    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return _refusal(500, "the server failed; the request may be repeated", None)


def _refusal(
    status: int,
    message: str,
    param: str | None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code, kind), status, dict(headers or {}))
