"""create_app(settings, engine, sink, registry, authenticate, consent): wiring only."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Response

from contracts.access import Authenticate, ConsentReader, Principal
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import ReleaseRegistry
from serving import errors, openai
from serving.answer import Desk
from serving.engine import Engine
from serving.gate import Gate
from serving.recorder import Recorder
from serving.settings import Settings
from serving.swap import WeightSwapper

log = logging.getLogger(__name__)


def end_process() -> None:
    """What a dead engine asks for: the supervisor restarts the process, and the engine with it."""
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
    desk = Desk(engine, gate, swapper, recorder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recorder.start()
        following = asyncio.create_task(_follow(swapper, on_engine_failure))
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await asyncio.to_thread(recorder.stop)
            await engine.stop()

    # A sync dependency runs on a thread: the key store reads a file.
    def principal(authorization: Annotated[str | None, Header()] = None) -> Principal:
        return authenticate(authorization)

    app = FastAPI(
        title="Instructloop", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    errors.install(app)
    app.include_router(openai.router(desk, principal, consent, settings.limits()))

    @app.get("/healthz")
    async def alive(response: Response) -> dict[str, str]:
        failure = engine.failure()
        response.status_code = 503 if failure else 200
        return {"status": "engine failed" if failure else "ok"}

    @app.get("/readyz")
    async def ready(response: Response) -> dict[str, str | None]:
        serving = swapper.serving
        ready = serving is not None and engine.failure() is None
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
