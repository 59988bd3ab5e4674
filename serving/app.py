"""create_app(settings, engine, sink, registry, authenticate, consent): wiring only."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Response

from contracts.access import Authenticate, ConsentReader, Principal
from contracts.errors import AccessDenied
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import ReleaseRegistry
from serving import admin, errors, openai
from serving.answer import Desk
from serving.engine import Engine
from serving.gate import Gate
from serving.recorder import Recorder
from serving.replica import ReplicaReporter, own_name
from serving.settings import Settings
from serving.swap import WeightSwapper

log = logging.getLogger(__name__)

# How long a server may take to end after its engine.
END_BOUND_S = 20.0


def end_process() -> None:
    """What a dead engine asks for: the supervisor restarts the process, and the engine with it.

    Answers that fail get their time to say so; a client that does not listen gets no more.
    """
    last_word = threading.Timer(END_BOUND_S, os._exit, (1,))
    last_word.daemon = True
    last_word.start()
    signal.raise_signal(signal.SIGTERM)


def create_app(
    settings: Settings,
    engine: Engine,
    sink: EventSink,
    registry: ReleaseRegistry,
    authenticate: Authenticate,
    consent: ConsentReader,
    stamper: Stamper | None = None,
    on_engine_failure: Callable[[], None] = end_process,
) -> FastAPI:
    """The serving app. It loads the registry's current release in the background and follows it
    from then on.
    """
    stamper = stamper or Stamper("serving")
    gate = Gate()
    recorder = Recorder(sink, stamper, settings.record_wait_s)
    swapper = WeightSwapper(engine, registry, gate, sink, stamper, settings.swap_options())
    name = settings.replica or own_name()
    replica = ReplicaReporter(name, registry, swapper, gate, stamper.clock)
    desk = Desk(engine, gate, swapper, recorder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recorder.start()
        tasks = [
            asyncio.create_task(_follow(swapper, on_engine_failure)),
            asyncio.create_task(replica.run()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(recorder.stop)
            await engine.stop()

    # A sync dependency runs on a thread: the key store reads a file.
    def principal(authorization: Annotated[str | None, Header()] = None) -> Principal:
        return authenticate(authorization)

    def operator(who: Annotated[Principal, Depends(principal)]) -> Principal:
        if "admin" not in who.scopes:
            raise AccessDenied("This needs a key with the scope `admin`.")
        return who

    app = FastAPI(
        title="Instructloop", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    errors.install(app)
    app.include_router(openai.router(desk, principal, consent, settings.limits()))
    app.include_router(admin.router(admin.Bridge(registry, swapper, replica), operator))

    @app.get("/healthz")
    async def alive(response: Response) -> dict[str, str]:
        failure = engine.failure()
        response.status_code = 503 if failure else 200
        return {"status": "engine failed" if failure else "ok"}

    @app.get("/readyz")
    async def ready(response: Response) -> dict[str, str | None]:
        serving = swapper.serving
        ready = serving is not None and engine.failure() is None and not replica.draining
        response.status_code = 200 if ready else 503
        return {
            "status": "ready" if ready else "not ready",
            "release": serving.id if serving else None,
        }

    return app


async def _follow(swapper: WeightSwapper, on_engine_failure: Callable[[], None]) -> None:
    try:
        await swapper.run()
    except Exception:
        log.exception("serving cannot go on")
        on_engine_failure()
