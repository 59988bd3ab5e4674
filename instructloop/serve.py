"""Serving and feedback in one process on one port: what one machine needs."""

import datetime as dt
import logging
import secrets
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from contracts.access import ConsentReader
from contracts.errors import InvalidInput
from contracts.log import Log
from contracts.release import Release, ReleaseRegistry
from feedback.app import create_app as create_feedback
from feedback.consent import ConsentLedger
from feedback.log import open_log
from feedback.log.spool import SpoolSettings
from feedback.log.spooled import SpooledLog, with_spool
from feedback.outage import ConsentWhileRoom, LastKnownConsent
from serving.access import KeyStore
from serving.app import create_app as create_serving
from serving.engine import VllmEngine
from serving.settings import Settings


@dataclass(frozen=True)
class Place:
    """Where a service keeps what it knows."""

    log: str
    registry: Path
    keys: Path


def open_events(url: str, spool: SpoolSettings) -> Log:
    """The log at `url`, with a spool before it where it is on other machines."""
    return with_spool(open_log(url), spool)


def create_app(place: Place, settings: Settings, events: Log, spool: SpoolSettings) -> FastAPI:
    """Completions, feedback and the Playground as one application."""
    consent: ConsentReader = ConsentLedger(events)
    recordable = consent
    if isinstance(events, SpooledLog):
        consent = LastKnownConsent(consent, events.spool)
        recordable = ConsentWhileRoom(consent, events.spool, spool.when_full == "refuse")
    authenticate = KeyStore(place.keys).authenticate
    app = create_serving(
        settings,
        VllmEngine(settings.engine_options()),
        events,
        ReleaseRegistry(place.registry),
        authenticate,
        recordable,
    )
    app.mount(
        "/", create_feedback(sink=events, source=events, authenticate=authenticate, consent=consent)
    )
    return app


def serve(place: Place, settings: Settings, host: str, port: int) -> None:
    """Run until SIGTERM or Ctrl-C; what is in flight finishes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    spool = SpoolSettings()
    with closing(open_events(place.log, spool)) as events:
        app = create_app(place, settings, events, spool)
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


def key_for_newcomer(place: Place) -> str:
    """A fresh key of a fresh person, for who opens the Playground for the first time."""
    key, _ = KeyStore(place.keys).create(f"guest-{secrets.token_hex(4)}")
    return key


def bring_model(registry: ReleaseRegistry, folder: Path, name: str, code_version: str) -> Release:
    """Publish a Hugging Face causal language model from a local folder as the first release.

    Its weights are released as float32 safetensors, the form in which the loop trains them on. The
    same folder again is the release that it was; another one is refused once something is
    released.
    """
    from training.model import canary_of, load_policy, load_tokenizer, save_policy

    with tempfile.TemporaryDirectory() as aside:
        save_policy(load_policy(folder), load_tokenizer(folder), Path(aside) / "model")
        artifact = registry.artifacts.put("policy", Path(aside) / "model")
    current = registry.current()
    if current is not None:
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
