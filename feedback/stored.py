"""Stored completions: what is kept of a person, for that person to see and to take back.

OpenAI's routes of stored chat completions, and the same for plain completions.
"""

import re
from collections.abc import Callable, Iterator
from itertools import dropwhile, islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic.json_schema import SkipJsonSchema

from contracts.access import Principal
from contracts.errors import InvalidInput, NotFound
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.v1 import events_pb2 as pb
from feedback.completions import Completions

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | SkipJsonSchema[None], Query(min_length=1, max_length=256)]
Order = Literal["asc", "desc"]
_METADATA = re.compile(r"metadata\[(.{0,64})\]", re.DOTALL)


def router(
    completions: Completions,
    sink: EventSink,
    stamper: Stamper,
    principal: Callable[..., Principal],
) -> APIRouter:
    """Plain functions: each runs on a thread, because it reads the log."""
    routes = APIRouter(tags=["stored completions"])
    Who = Annotated[Principal, Depends(principal)]

    def page(
        chat: bool, who: Principal, request: Request, model: str | None, window: "_Window"
    ) -> dict[str, Any]:
        wanted = _filter(chat, model, request)
        newest_first = window.order == "desc"
        mine = filter(wanted, completions.of(who.user_id, newest_first=newest_first))
        return window.of(described(event) for event in mine)

    def one(chat: bool, who: Principal, completion_id: str) -> pb.Event:
        event = completions.get(who.user_id, completion_id)
        if _is_chat(event) != chat:
            kind = "chat completion" if chat else "completion"
            raise NotFound(f"{completion_id!r} is not a {kind}", "completion_id")
        return event

    def take_back(chat: bool, who: Principal, completion_id: str) -> dict[str, Any]:
        body = one(chat, who, completion_id).completion
        withdrawal = pb.Withdrawal(completion_id=body.completion_id)
        sink.append([stamper.event(who.user_id, withdrawal)])
        kind = "chat.completion.deleted" if chat else "text_completion.deleted"
        return {"object": kind, "id": completion_id, "deleted": True}

    for base, chat in (("/v1/chat/completions", True), ("/v1/completions", False)):
        _add(routes, base, chat, Who, page, one, take_back)

    @routes.get("/v1/chat/completions/{completion_id}/messages")
    def list_messages(
        completion_id: str,
        who: Who,
        limit: Limit = 20,
        after: After = None,
        order: Order = "asc",
    ) -> dict[str, Any]:
        event = one(True, who, completion_id)
        messages = [
            {"id": f"{completion_id}-{i}", "role": m.role, "content": m.content, "name": None}
            for i, m in enumerate(event.completion.prompt.messages)
        ]
        window = _Window(limit, after, order)
        return window.of(iter(messages if order == "asc" else messages[::-1]))

    return routes


def _add(
    routes: APIRouter,
    base: str,
    chat: bool,
    Who: Any,
    page: Callable[..., dict[str, Any]],
    one: Callable[..., pb.Event],
    take_back: Callable[..., dict[str, Any]],
) -> None:
    """The routes that both kinds of completions have."""
    name = "chat_completion" if chat else "completion"

    @routes.get(base, operation_id=f"list_{name}s")
    def list_stored(
        who: Who,
        request: Request,
        model: Annotated[str | SkipJsonSchema[None], Query(max_length=256)] = None,
        limit: Limit = 20,
        after: After = None,
        order: Order = "asc",
    ) -> dict[str, Any]:
        """Filter with `metadata[key]=value`."""
        return page(chat, who, request, model, _Window(limit, after, order))

    @routes.get(f"{base}/{{completion_id}}", operation_id=f"get_{name}")
    def get_stored(completion_id: str, who: Who) -> dict[str, Any]:
        return described(one(chat, who, completion_id))

    @routes.post(f"{base}/{{completion_id}}", include_in_schema=False)
    def update_stored(completion_id: str, who: Who) -> dict[str, Any]:
        """Refused: what was recorded is not changed afterwards."""
        raise HTTPException(
            405,
            "A stored completion is not changed; say more about it with /v1/feedback/comments.",
            {"allow": "DELETE, GET"},
        )

    @routes.delete(f"{base}/{{completion_id}}", operation_id=f"delete_{name}")
    def delete_stored(completion_id: str, who: Who) -> dict[str, Any]:
        """Takes the completion back: no later dataset holds it or what was said about it."""
        return take_back(chat, who, completion_id)


class _Window:
    """One page of a list, as OpenAI cuts it."""

    def __init__(self, limit: int, after: str | None, order: Order) -> None:
        self._limit, self._after, self.order = limit, after, order

    def of(self, items: Iterator[dict[str, Any]]) -> dict[str, Any]:
        if self._after is not None:
            items = dropwhile(lambda item: item["id"] != self._after, items)
            if next(items, None) is None:
                raise NotFound(f"after: no {self._after!r} is in this list", "after")
        found = list(islice(items, self._limit + 1))
        data = found[: self._limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > self._limit,
        }


def _filter(chat: bool, model: str | None, request: Request) -> Callable[[pb.Event], bool]:
    metadata = {}
    for name, value in request.query_params.multi_items():
        if found := _METADATA.fullmatch(name):
            metadata[found[1]] = value
        elif name not in ("model", "limit", "after", "order"):
            raise InvalidInput(name[:64], "model, metadata[...], limit, after or order", "another")

    def wanted(event: pb.Event) -> bool:
        body = event.completion
        return (
            _is_chat(event) == chat
            and model in (None, body.model)
            and all(body.metadata.get(name) == value for name, value in metadata.items())
        )

    return wanted


def described(event: pb.Event) -> dict[str, Any]:
    """A completion as OpenAI's object, with what it was asked where that has no messages."""
    body, chat = event.completion, _is_chat(event)
    return {
        "id": body.completion_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": event.time.seconds,
        "model": body.model,
        "system_fingerprint": _releases(body),
        "choices": [_choice(output, chat) for output in body.outputs],
        "metadata": dict(body.metadata),
        **({} if chat else {"prompt": body.prompt.text}),
    }


def _releases(body: pb.Completion) -> str:
    """As the answer said it: of several, each once."""
    named = dict.fromkeys(output.release_id or body.release_id for output in body.outputs)
    return ",".join(named)


def _choice(output: pb.Output, chat: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": output.text, "refusal": None}
    said = {"message": message} if chat else {"text": output.text}
    end = output.finish_reason or None
    by = {"release": output.release_id} if output.release_id else {}
    return {"index": output.index, **said, "logprobs": None, "finish_reason": end, **by}


def _is_chat(event: pb.Event) -> bool:
    return bool(event.completion.prompt.messages)
