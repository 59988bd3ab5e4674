"""The OpenAI-style API on top of vLLM's own handlers. Only what is listed here exists."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from contracts.access import ConsentReader, Principal
from contracts.errors import InvalidInput, NotFound
from contracts.release import Release
from contracts.v1 import events_pb2 as pb
from serving.access import agreed_notice
from serving.answer import Answer, Ask, Desk
from serving.engine import Body, EngineRefused, Kind
from serving.recorder import Permit, recordable_prompt

# Passed on to the engine. Every other field is refused by name: silently ignored, it would change
# the answer unseen.
SHARED_FIELDS = frozenset(
    "model max_tokens temperature top_p n stream stream_options stop seed presence_penalty "
    "frequency_penalty logit_bias logprobs top_k min_p repetition_penalty min_tokens ignore_eos "
    "stop_token_ids return_token_ids".split()
)
ENGINE_FIELDS: dict[Kind, frozenset[str]] = {
    "completions": SHARED_FIELDS | {"prompt", "echo"},
    "chat": SHARED_FIELDS | {"messages", "top_logprobs", "max_completion_tokens"},
}
# Understood here; the engine does not see them.
OWN_FIELDS = frozenset({"metadata", "user", "best_of", "suffix"})
# OpenAI's defaults, said aloud: the model folder's generation_config.json must not change them, nor
# what is recorded.
DEFAULTS: Body = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
DEFAULT_MAX_TOKENS = 16

MAX_COMPLETION_LOGPROBS = 5
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for."""

    max_n: int = 16
    max_body_bytes: int = 1 << 20


def router(
    desk: Desk, principal: Callable[..., Principal], consent: ConsentReader, limits: Limits
) -> APIRouter:
    """The routes; each demands a key through the dependency `principal`."""
    routes = APIRouter(prefix="/v1")
    Caller = Annotated[Principal, Depends(principal)]

    async def answer(kind: Kind, request: Request, caller: Principal) -> Answer:
        body = _parse(await _read(request, limits.max_body_bytes))
        asked = check(kind, body, limits)
        if asked["model"] != _serving(desk).model:
            raise NotFound(
                f"The model `{asked['model']}` does not exist or you do not have access to it."
            )
        permit = await run_in_threadpool(_permit, kind, body, asked, request, caller, consent)
        wants_token_ids = bool(asked.get("return_token_ids"))
        # Only where they are needed: with them vLLM leaves the prompt out of an echo.
        engine_body = asked | {"return_token_ids": wants_token_ids or permit is not None}
        return Answer(desk, Ask(kind, engine_body, wants_token_ids, permit))

    @routes.post("/completions")
    async def create_completion(request: Request, caller: Caller) -> Answer:
        return await answer("completions", request, caller)

    @routes.post("/chat/completions")
    async def create_chat_completion(request: Request, caller: Caller) -> Answer:
        return await answer("chat", request, caller)

    @routes.get("/models")
    async def list_models(caller: Caller) -> Body:
        return {"object": "list", "data": [_model(_serving(desk))]}

    @routes.get("/models/{model_id:path}")
    async def retrieve_model(model_id: str, caller: Caller) -> Body:
        if model_id != _serving(desk).model:
            raise NotFound(
                f"The model `{model_id}` does not exist or you do not have access to it."
            )
        return _model(_serving(desk))

    @routes.get("/releases")
    async def list_releases(caller: Caller) -> Body:
        changes = [asdict(change) for change in desk.swapper.changes]
        serving = desk.swapper.serving
        return {"object": "list", "serving": serving.id if serving else None, "data": changes}

    return routes


def check(kind: Kind, body: Body, limits: Limits) -> Body:
    """The fields for the engine, defaults filled in. Raises InvalidInput for what we do not do as
    asked.
    """
    asked = {name: value for name, value in body.items() if value is not None}
    for name in asked.keys() - ENGINE_FIELDS[kind] - OWN_FIELDS:
        raise InvalidInput(name, "a supported request argument", "an unrecognized one")
    if not isinstance(asked.get("model"), str):
        raise InvalidInput("model", "a model's name", asked.get("model"))
    asked = DEFAULTS | asked
    if kind == "completions":
        asked.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    _check_count(asked, limits)
    _check_metadata(asked.get("metadata", {}))
    if "suffix" in asked:
        raise InvalidInput("suffix", "no suffix: this model does not insert", "one")
    if (
        kind == "completions"
        and isinstance(asked.get("logprobs"), int)
        and asked["logprobs"] > MAX_COMPLETION_LOGPROBS
    ):
        raise InvalidInput("logprobs", f"at most {MAX_COMPLETION_LOGPROBS}", asked["logprobs"])
    return {name: value for name, value in asked.items() if name not in OWN_FIELDS}


def _check_count(asked: Body, limits: Limits) -> None:
    n = asked["n"]
    if type(n) is not int or not 1 <= n <= limits.max_n:
        raise InvalidInput("n", f"an integer from 1 to {limits.max_n}", n)
    if asked.get("best_of", n) != n:
        raise InvalidInput(
            "best_of", "the same as n: ask for n answers and choose among them", asked["best_of"]
        )


def _check_metadata(metadata: Any) -> None:
    lengths = f"{MAX_METADATA_KEY} and {MAX_METADATA_VALUE} characters"
    expected = f"up to {MAX_METADATA} strings by name ({lengths})"
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise InvalidInput("metadata", expected, type(metadata).__name__)
    for name, value in metadata.items():
        if (
            len(name) > MAX_METADATA_KEY
            or not isinstance(value, str)
            or len(value) > MAX_METADATA_VALUE
        ):
            raise InvalidInput(
                f"metadata.{name[:MAX_METADATA_KEY]}", expected, type(value).__name__
            )


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise InvalidInput("body", f"at most {limit} bytes", f"more than {limit}")
    return bytes(body)


def _parse(raw: bytes) -> Body:
    """A JSON object whose text can be written down again. Says nothing of its content: errors may
    be logged.
    """
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except ValueError:
        raise InvalidInput("body", "valid JSON in UTF-8", "something else") from None
    if not isinstance(body, dict):
        raise InvalidInput("body", "a JSON object", type(body).__name__)
    return body


def _permit(
    kind: Kind, body: Body, asked: Body, request: Request, caller: Principal, consent: ConsentReader
) -> Permit | None:
    """Whether this completion is recorded, and as what; None where anything is missing."""
    playground = request.headers.get("x-instructloop-source") == "playground"
    shown = request.headers.get("x-instructloop-notice")
    notice = agreed_notice(caller, consent, playground=playground, shown_notice=shown)
    prompt = recordable_prompt(kind, asked) if notice is not None else None
    if notice is None or prompt is None:
        return None
    return Permit(
        user_id=caller.user_id,
        notice_version=notice,
        source=pb.SOURCE_PLAYGROUND if playground else pb.SOURCE_API,
        prompt=prompt,
        sampling=_sampling(asked),
        metadata=body.get("metadata") or {},
    )


def _sampling(asked: Body) -> pb.Sampling:
    """As the engine samples; `max_tokens` 0 where only the context bounds the answer."""
    bound = asked.get("max_completion_tokens", asked.get("max_tokens", 0))
    return pb.Sampling(
        temperature=asked["temperature"],
        top_p=asked["top_p"],
        max_tokens=bound,
        seed=asked.get("seed"),
    )


def _serving(desk: Desk) -> Release:
    if desk.swapper.serving is None:
        raise EngineRefused("The model is still loading.", status=503)
    return desk.swapper.serving


def _model(release: Release) -> Body:
    return {
        "id": release.model,
        "object": "model",
        "created": int(release.created.timestamp()),
        "owned_by": "instructloop",
    }
