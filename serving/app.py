"""create_app(settings, engine, sink, registry, authenticate, consent): wiring only."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from contracts.access import Authenticate, ConsentReader
from contracts.events import Stamper
from contracts.log import EventSink
from contracts.refusal import DOCUMENTED
from contracts.release import ReleaseRegistry
from serving import admin, content_filter, errors, openai, telemetry
from serving import keys as key_routes
from serving.access import Door, KeyStore
from serving.answer import Desk
from serving.bounded import Bounded
from serving.engine import Engine
from serving.gate import Gate
from serving.limits import Limiter
from serving.metrics import CONTENT_TYPE, Metrics
from serving.recorder import Recorder
from serving.replica import ReplicaReporter, own_name
from serving.settings import Settings
from serving.swap import WeightSwapper

log = logging.getLogger(__name__)

# For the OpenAPI document.
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}

# Of an offer, which holds the headers of all weight files.
PUSH_BYTES = 64 << 20

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


def create_app(  # noqa: PLR0913, PLR0917  it puts all of them together
    settings: Settings,
    engine: Engine,
    sink: EventSink,
    registry: ReleaseRegistry,
    authenticate: Authenticate,
    consent: ConsentReader,
    stamper: Stamper | None = None,
    on_engine_failure: Callable[[], None] = end_process,
    keys: KeyStore | None = None,
    more_metrics: Iterable[Collector] = (),
) -> FastAPI:
    """The serving app. It loads the registry's current release in the background and follows it
    from then on.

    Every route asks for a key: the app itself depends on one, so that a route cannot be added
    without. The probes are no routes of the API and are added beneath it. With `keys` the admin
    API makes and revokes them. `more_metrics` stand beside its own.
    """
    stamper = stamper or Stamper("serving")
    gate, limiter = Gate(), Limiter(settings.limit_options(), "serving")
    recorder = Recorder(sink, stamper, settings.record_wait_s)
    swapper = WeightSwapper(engine, registry, gate, sink, stamper, settings.swap_options())
    name = settings.replica or own_name()
    replica = ReplicaReporter(name, registry, swapper, gate, stamper.clock)
    metrics = Metrics(swapper, recorder, limiter)
    for more in more_metrics:
        metrics.add(more)
    judge = content_filter.load(settings.content_filter)
    desk = Desk(engine, gate, swapper, recorder, limiter, metrics, judge, settings.stall_bound_s)
    door = Door(authenticate, settings.organization, limiter)
    tracing = telemetry.tracer_to(settings.otlp_endpoint)

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
            if tracing is not None:
                await asyncio.to_thread(tracing[1].shutdown)

    app = FastAPI(
        title="Instructloop",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(door)],
        responses=DOCUMENTED,
        # `name@release` and other ids hold what a redirect would spoil.
        redirect_slashes=False,
    )
    app.state.swapper = swapper
    errors.install(app, metrics.limits)
    push = {"/v1/admin/push": PUSH_BYTES} if settings.push else {}
    app.add_middleware(
        Bounded,
        max_bytes=settings.max_body_bytes,
        larger=push,
        bound_s=settings.read_bound_s,
    )
    app.add_middleware(
        telemetry.Telemetry,
        metrics=metrics,
        organization=settings.organization,
        tracer=tracing[0] if tracing else None,
    )
    app.include_router(openai.router(desk, door, consent, settings.limits()))
    app.include_router(_metrics_route(metrics, door))
    bridge = admin.Bridge(registry, swapper, replica, settings.push or None)
    app.include_router(admin.router(bridge, door.opens("admin")))
    if keys is not None:
        app.include_router(key_routes.router(keys, door))
    _add_probes(app, engine, swapper, replica)
    return app


def _metrics_route(metrics: Metrics, door: Door) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    opened = [Depends(door.opens("metrics", "admin"))]

    @routes.get("/metrics", dependencies=opened, response_class=Response, responses=METRICS)
    def read_metrics() -> Response:
        """In Prometheus's format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return routes


def _add_probes(
    app: FastAPI, engine: Engine, swapper: WeightSwapper, replica: ReplicaReporter
) -> None:
    """What an orchestrator asks, without a key; they tell nothing but a state and a release."""

    async def alive(request: Request) -> Response:
        failure = engine.failure()
        status = {"status": "engine failed" if failure else "ok"}
        return JSONResponse(status, 503 if failure else 200)

    async def ready(request: Request) -> Response:
        serving = swapper.serving
        ready = serving is not None and engine.failure() is None and not replica.draining
        status = {
            "status": "ready" if ready else "not ready",
            "release": serving.id if serving else None,
        }
        return JSONResponse(status, 200 if ready else 503)

    app.add_route("/healthz", alive)
    app.add_route("/readyz", ready)


async def _follow(swapper: WeightSwapper, on_engine_failure: Callable[[], None]) -> None:
    try:
        await swapper.run()
    except Exception:
        log.exception("serving cannot go on")
        on_engine_failure()
