"""The OpenAI-style API on top of vLLM's own handlers. Only what is listed here exists."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from contracts.access import ConsentReader, Principal
from contracts.errors import AccessDenied, NotFound
from contracts.release import Release
from contracts.v1 import events_pb2 as pb
from serving.access import Door, agreed_notice
from serving.answer import Answer, Ask, Desk
from serving.candidates import (
    Comparison,
    candidates_in,
    described_candidates,
    documented_candidates,
)
from serving.engine import Body, Kind
from serving.limits import estimated_tokens
from serving.recorder import Permit, recordable_prompt
from serving.request import checked, described, parse, prompts
from serving.response import documented
from serving.telemetry import visit_of

log = logging.getLogger(__name__)

# Understood here; the engine does not see them.
OWN_FIELDS = frozenset({"metadata", "user", "safety_identifier", "store", "best_of"})
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
# Temperature 0 in other words: below this one vLLM gives one answer only, OpenAI as many as asked.
GREEDY_BELOW = 1e-5
GREEDY: Body = {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0}


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how long it waits to know whether it may be kept."""

    max_n: int = 16
    consent_bound_s: float = 1.0


def router(desk: Desk, door: Door, consent: ConsentReader, limits: Limits) -> APIRouter:
    """The routes of who may ask for completions."""
    routes = APIRouter(prefix="/v1", tags=["completions"])
    Caller = Annotated[Principal, Depends(door.opens("complete"))]
    clerk = _Clerk(desk, consent, limits)

    @routes.post(
        "/completions",
        openapi_extra=described("completions", limits.max_n),
        responses=documented("completions"),
    )
    async def create_completion(request: Request, caller: Caller) -> Answer:
        return await clerk.answer("completions", request, caller)

    @routes.post(
        "/chat/completions",
        openapi_extra=described("chat", limits.max_n),
        responses=documented("chat"),
    )
    async def create_chat_completion(request: Request, caller: Caller) -> Answer:
        return await clerk.answer("chat", request, caller)

    @routes.post(
        "/feedback/candidates",
        tags=["feedback"],
        openapi_extra=described_candidates(limits.max_n),
        responses=documented_candidates(),
    )
    async def create_candidates(request: Request, caller: Caller) -> Comparison:
        """Several releases answer one prompt, as one completion to be ranked."""
        return await clerk.compare(request, caller)

    @routes.get("/models")
    async def list_models(caller: Caller) -> Body:
        data = [_model(desk.serving())]
        if len(loaded := desk.swapper.loaded) > 1:
            data += [_model(r) | {"id": f"{r.model}@{r.id}"} for r in loaded.values()]
        return {"object": "list", "data": data}

    @routes.get("/models/{model_id:path}")
    async def retrieve_model(model_id: str, caller: Caller) -> Body:
        named = _named(desk, model_id)
        return _model(desk.serving(named)) | {"id": model_id}

    @routes.delete("/models/{model_id:path}")
    async def delete_model(model_id: str, caller: Caller) -> Body:
        raise AccessDenied(
            "Models are not deleted: a release is followed by another one or rolled back, "
            "by an operator.",
            "model_not_deletable",
        )

    @routes.get("/releases")
    async def list_releases(caller: Caller) -> Body:
        changes = [asdict(change) for change in desk.swapper.changes]
        serving = desk.swapper.serving
        return {
            "object": "list",
            "serving": serving.id if serving else None,
            "loaded": list(desk.swapper.loaded),
            "data": changes,
        }

    return routes


class _Clerk:
    """Checks a request, decides what of it may be kept, and makes the answer."""

    def __init__(self, desk: Desk, consent: ConsentReader, limits: Limits) -> None:
        self._desk, self._consent, self._limits = desk, consent, limits
        # Where the log takes time to say who agreed, only these wait for it.
        self._asking = ThreadPoolExecutor(thread_name_prefix="consent")

    async def answer(self, kind: Kind, request: Request, who: Principal) -> Answer:
        said = parse(await request.body())
        return Answer(self._desk, await self._ask(kind, said, request, who))

    async def compare(self, request: Request, who: Principal) -> Comparison:
        candidates, kind, said = candidates_in(parse(await request.body()))
        ask = await self._ask(kind, said, request, who, readers=len(candidates))
        return Comparison(self._desk, ask, candidates)

    async def _ask(
        self, kind: Kind, body: Body, request: Request, who: Principal, readers: int = 1
    ) -> Ask:
        visit = visit_of(request.scope)
        said = checked(kind, body, self._limits.max_n)
        release = _named(self._desk, said["model"])
        model = self._desk.serving(release).model
        asked = filled(kind, said | {"model": model})
        permit = await self._permit(kind, said, asked, request, who)
        if asked["n"] > 1 and asked["temperature"] < GREEDY_BELOW:
            asked |= GREEDY
        cost = _cost(kind, asked, readers)
        limiter = self._desk.limiter
        left = await limiter.aside(limiter.take_tokens, who, cost)
        visit.headers |= left
        wants_token_ids = bool(said.get("return_token_ids"))
        # Only where they are needed: with them vLLM leaves the prompt out of an echo.
        asked["return_token_ids"] = wants_token_ids or permit is not None
        return Ask(
            kind=kind,
            body=asked,
            who=who,
            release=release,
            n=said.get("n", 1),
            wants_logprobs=said.get("logprobs") is not None,
            wants_token_ids=wants_token_ids,
            wants_usage=bool((said.get("stream_options") or {}).get("include_usage")),
            permit=permit,
            tokens_taken=cost if left else None,
        )

    async def _permit(
        self, kind: Kind, said: Body, asked: Body, request: Request, who: Principal
    ) -> Permit | None:
        """Whether this completion is recorded, and as what. None where anything is missing, also
        the answer to the question. Raises AccessDenied where the client insists.
        """
        if said.get("store") is False:
            return None
        playground = request.headers.get("x-instructloop-source") == "playground"
        at, notice = time.time(), await self._notice(request, who, playground)
        # The tools belong to the prompt, and an event has no place for them.
        prompt = recordable_prompt(kind, asked) if "tools" not in asked else None
        if notice is not None and prompt is not None:
            return Permit(
                user_id=who.user_id,
                notice_version=notice,
                source=pb.SOURCE_PLAYGROUND if playground else pb.SOURCE_API,
                prompt=prompt,
                sampling=_sampling(asked),
                metadata=_metadata(said),
                at=at,
            )
        if said.get("store"):
            raise AccessDenied(*_not_stored(consented=notice is not None))
        return None

    async def _agreed(self, ask: Callable[..., str | None]) -> str | None:
        with suppress(BlockingIOError):
            return ask(wait=False)
        async with asyncio.timeout(self._limits.consent_bound_s):
            return await asyncio.get_running_loop().run_in_executor(self._asking, ask)

    async def _notice(self, request: Request, who: Principal, playground: bool) -> str | None:
        """The notice under which the request may be kept; fails closed, and holds nobody up."""
        shown = request.headers.get("x-instructloop-notice")
        refusals = self._desk.metrics.consent_refusals
        try:
            notice = await self._agreed(
                partial(agreed_notice, who, self._consent, playground, shown)
            )
        except Exception as e:  # noqa: BLE001  whatever the log's client raises
            log.warning("consent cannot be asked, nothing is kept: %s", type(e).__name__)
            refusals.labels("unknown").inc()
            return None
        if notice is None:
            refusals.labels("production" if who.production else "none").inc()
        return notice


def filled(kind: Kind, said: Body) -> Body:
    """The fields for the engine, defaults filled in."""
    asked = DEFAULTS | {name: said[name] for name in said if name not in OWN_FIELDS}
    if kind == "completions":
        asked.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        if asked.get("prompt") == "":
            del asked["prompt"]
        if said.get("best_of", 1) > asked["n"]:
            # The choice among samples needs their log-probabilities.
            asked |= {"n": said["best_of"], "logprobs": said.get("logprobs", 0)}
    if said.get("stream"):
        asked["stream_options"] = {"include_usage": True}  # for the key's tokens
    return asked


def _named(desk: Desk, model: str) -> str | None:
    """The release in `name@release`; None for the name alone. Raises NotFound for another name."""
    serving = desk.serving()
    name, at, release = model.partition("@")
    if name != serving.model or (at and not release):
        raise NotFound(
            f"The model `{model}` does not exist or you do not have access to it.", "model"
        )
    return release or None


def _cost(kind: Kind, asked: Body, readers: int) -> int:
    """Tokens that the request may cost, as far as anyone can say before it is read: the prompt's
    by its length, for each release that reads it, and all that it lets the model write.
    """
    prompt = asked.get("prompt") if kind == "completions" else asked["messages"]
    per_prompt = asked["n"] * _bound(asked)
    if isinstance(prompt, list) and kind == "completions":
        parts = prompt if not isinstance(prompt[0], int) else [prompt]
        read = sum(len(p) if isinstance(p, list) else estimated_tokens(len(p)) for p in parts)
        return int(readers * read + prompts(prompt) * per_prompt)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt or "")
    return int(readers * estimated_tokens(len(text)) + per_prompt)


def _bound(asked: Body) -> int:
    """`max_tokens`; 0 where only the context bounds the answer."""
    return int(asked.get("max_completion_tokens") or asked.get("max_tokens") or 0)


def _metadata(said: Body) -> dict[str, str]:
    """The client's own, with the end user that it names."""
    ends = {n: said[n] for n in ("user", "safety_identifier") if said.get(n)}
    return {**ends, **(said.get("metadata") or {})}


def _not_stored(*, consented: bool) -> tuple[str, str]:
    """Why a request that asks to be stored is refused, in words and as a code."""
    if consented:
        why = (
            "this request cannot be kept as it is; only one text, or plain messages of system, "
            "user and assistant, without echo and tools, can."
        )
        return f"store: {why}", "not_storable"
    why = (
        "nothing of this key is kept, because its owner did not agree to it or because it is a "
        "production key. Agree with PUT /v1/consent, or leave store out."
    )
    return f"store: {why}", "consent_required"


def _sampling(asked: Body) -> pb.Sampling:
    """As the engine samples; `max_tokens` 0 where only the context bounds the answer."""
    return pb.Sampling(
        temperature=asked["temperature"],
        top_p=asked["top_p"],
        max_tokens=_bound(asked),
        seed=asked.get("seed"),
    )


def _model(release: Release) -> dict[str, Any]:
    return {
        "id": release.model,
        "object": "model",
        "created": int(release.created.timestamp()),
        "owned_by": "instructloop",
    }
