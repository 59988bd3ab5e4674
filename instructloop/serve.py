"""Serving and feedback in one process on one port: what one machine needs."""

import datetime as dt
import logging
import secrets
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from contracts.access import Authenticate, ConsentReader, Principal
from contracts.errors import InvalidInput
from contracts.release import Release, ReleaseRegistry
from feedback.app import create_app as create_feedback
from feedback.consent import ConsentLedger, ConsentStates
from feedback.log.spool import SpoolSettings
from feedback.log.spooled import SpooledLog
from feedback.outage import ConsentWhileRoom, LastKnownConsent
from feedback.rights import Rights
from feedback.vault import open_events
from feedback.vault.sealed import SealedLog
from instructloop.letters import Letters
from instructloop.waiting import Waiting
from serving.access import KeyStore
from serving.app import create_app as create_serving
from serving.app import end_process
from serving.engine import Engine, VllmEngine
from serving.limits import Limiter
from serving.settings import Settings
from serving.telemetry import configure_logging


@dataclass(frozen=True)
class Place:
    """Where a service keeps what it knows."""

    log: str
    registry: Path
    keys: Path


def create_app(
    place: Place,
    settings: Settings,
    events: SealedLog,
    spool: SpoolSettings,
    engine: Engine | None = None,
    on_engine_failure: Callable[[], None] = end_process,
) -> FastAPI:
    """Completions, feedback and the Playground as one application, on vLLM by default, with one
    OpenAPI document.
    """
    consent, recordable = _consents(events, spool)
    registry = ReleaseRegistry(place.registry)
    keys = KeyStore(place.keys)
    app = create_serving(
        settings,
        engine or VllmEngine(settings.engine_options()),
        events,
        registry,
        keys.authenticate,
        recordable,
        on_engine_failure=on_engine_failure,
        keys=keys,
        more_metrics=[Letters(events), *_waiting(events)],
    )
    feedback = create_feedback(
        sink=events,
        source=events,
        authenticate=_limited(keys.authenticate, Limiter(settings.limit_options(), "feedback")),
        consent=consent,
        rights=Rights(events, events, registry, consent=consent),
    )
    app.openapi_schema = _together(app.openapi(), feedback.openapi())
    app.router.routes.append(_OtherMethods([*app.routes, *feedback.routes]))
    app.mount("/", feedback)
    return app


def serve(
    place: Place,
    settings: Settings,
    host: str,
    port: int,
    engine: Engine | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Run until SIGTERM or Ctrl-C; what is in flight finishes, within the bound, and its events are
    written. Ends the process with status 0, or with 1 where the engine failed.

    `prepare` is called when every setting has proved right, before the port opens. Raises
    InvalidInput for one that is wrong.
    """
    configure_logging(settings.log_format)
    hide_messages_of_exceptions()
    spool, failed = SpoolSettings(), threading.Event()

    def fail() -> None:
        failed.set()
        end_process()

    def end(*_: object) -> None:
        raise SystemExit(1 if failed.is_set() else 0)

    # Uvicorn drains, then raises the signal again: by default the process would end right there.
    signal.signal(signal.SIGTERM, end)
    with closing(open_events(place.log, spool=spool)) as events:
        app = create_app(place, settings, events, spool, engine, fail)
        prepare()
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.shutdown_bound_s,
        )


def _waiting(events: SealedLog) -> list[Waiting]:
    """What waits for a log on other machines; a log on this one has nothing before it."""
    return [Waiting(events.inner.spool)] if isinstance(events.inner, SpooledLog) else []


def _consents(events: SealedLog, spool: SpoolSettings) -> tuple[ConsentStates, ConsentReader]:
    """What people agreed to; and the same for what is about to be recorded, if there is room."""
    consent = ConsentLedger(events)
    if not isinstance(events.inner, SpooledLog):
        return consent, consent
    waiting = events.inner.spool
    known = LastKnownConsent(consent, waiting)
    return known, ConsentWhileRoom(known, waiting, spool.when_full == "refuse")


def hide_messages_of_exceptions() -> None:
    """From now on a logged exception says its type and where it was raised, not its message: that
    may hold what a person sent.
    """
    hide = _Hide()
    logging.getLogger("uvicorn.error").addFilter(hide)
    for handler in logging.getLogger().handlers:
        handler.addFilter(hide)


class _Hide(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frames = "".join(traceback.format_tb(error.__traceback__))
            record.exc_info, record.exc_text = None, f"{frames}{type(error).__name__}"
        return True


def _limited(authenticate: Authenticate, limiter: Limiter) -> Authenticate:
    """The feedback API under the same limit of requests as completions, counted apart from them."""

    def known(authorization: str | None) -> Principal:
        who = authenticate(authorization)
        limiter.take_request(who)
        return who

    return known


class _OtherMethods(BaseRoute):
    """Refuses a method that a path of either application does not have, and names those that it
    has. By themselves each would name its own, and the first would leave it to the second.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        found = [(route.matches(scope)[0], route) for route in self._routes]
        known = {m for match, r in found if match is Match.PARTIAL for m in self._told(r)}
        taken = any(match is Match.FULL for match, _ in found)
        return (Match.FULL, {"allowed": known}) if known and not taken else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = ", ".join(sorted(scope["allowed"]))
        detail = f"Method {scope['method']} is not allowed here; allowed: {allowed}"
        raise HTTPException(405, detail, {"allow": allowed})

    @staticmethod
    def _told(route: Route) -> Collection[str]:
        """Without those that only say why they refuse."""
        return route.methods or () if route.include_in_schema else ()


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two OpenAPI documents as one. Paths that both have, with other methods, are merged."""
    paths = {
        path: first["paths"].get(path, {}) | second["paths"].get(path, {})
        for path in first["paths"] | second["paths"]
    }
    parts, more = first.get("components", {}), second.get("components", {})
    components = {kind: {**parts.get(kind, {}), **more.get(kind, {})} for kind in {**parts, **more}}
    return first | {"paths": paths, "components": components}


def key_for_newcomer(place: Place) -> str | None:
    """A fresh key of a fresh person, for who opens the Playground for the first time; None where
    there are keys.
    """
    keys = KeyStore(place.keys)
    return None if keys.list() else keys.create(f"guest-{secrets.token_hex(4)}")[0]


def bring_model(registry: ReleaseRegistry, folder: Path, name: str, code_version: str) -> Release:
    """Publish a Hugging Face causal language model from a local folder as the first release.

    Its weights are released as float32 safetensors, the form in which the loop trains them on. The
    same folder again is the release that it was; another one, or another name, is refused once
    something is released.
    """
    from training.model import canary_of, load_policy, load_tokenizer, save_policy

    with tempfile.TemporaryDirectory() as aside:
        save_policy(load_policy(folder), load_tokenizer(folder), Path(aside) / "model")
        artifact = registry.artifacts.put("policy", Path(aside) / "model")
    current = registry.current()
    if current is not None:
        if name != current.model:
            raise InvalidInput("--name", f"{current.model}, as {current.id} is called", name)
        if any(registry.get(i).artifact == artifact for i in registry.history()):
            return current
        raise InvalidInput(
            "--model",
            f"an empty registry; {registry.root} already serves {current.id}",
            str(folder),
        )
    release = Release(
        id=registry.next_id(artifact),
        model=name,
        created=dt.datetime.now(dt.UTC),
        artifact=artifact,
        canary=canary_of(registry.artifacts.path(artifact)),
        code_version=code_version,
    )
    registry.publish(release)
    return release
