"""The admin API of keys: create, list, revoke; for keys with the scope admin."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from contracts.access import USER_SCOPES, Scope
from contracts.fields import WHOLE
from serving.access import PROJECT, Door, KeyInfo, KeyStore

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"\S")]
PerMinute = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]


class KeyRequest(BaseModel):
    """A new key: whose it is, what it opens, and its own limits; null: those of the server."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"user_id": "user-1", "scopes": ["complete", "feedback"]}]},
    )

    user_id: Name
    production: bool = False
    scopes: Annotated[list[Scope], Field(min_length=1)] = sorted(USER_SCOPES)
    project: Annotated[str, Field(pattern=f"^{PROJECT.pattern}$")] = "default"
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None


def router(keys: KeyStore, door: Door) -> APIRouter:
    """Plain functions: each runs on a thread, because the store reads a file."""
    admin = [Depends(door.opens("admin"))]
    routes = APIRouter(prefix="/v1/admin", tags=["keys"], dependencies=admin)

    @routes.get("/keys")
    def list_keys() -> dict[str, Any]:
        return {"object": "list", "data": [described(info) for info in keys.list()]}

    @routes.post("/keys")
    def create_key(body: KeyRequest) -> dict[str, Any]:
        """The reply holds the key itself, which nothing can show again."""
        key, key_id = keys.create(**body.model_dump())
        (info,) = (i for i in keys.list() if i.principal.key_id == key_id)
        return described(info) | {"key": key}

    @routes.delete("/keys/{key_id}")
    def revoke_key(key_id: str) -> dict[str, Any]:
        """From the reply on, the key opens nothing."""
        keys.revoke(key_id)
        return {"object": "api_key", "id": key_id, "revoked": True}

    return routes


def described(info: KeyInfo) -> dict[str, Any]:
    who = info.principal
    return {
        "object": "api_key",
        "id": who.key_id,
        "user_id": who.user_id,
        "production": who.production,
        "scopes": sorted(who.scopes),
        "project": who.project,
        "requests_per_minute": who.requests_per_minute,
        "tokens_per_minute": who.tokens_per_minute,
        "created": int(info.created),
        "revoked": None if info.revoked is None else int(info.revoked),
    }
