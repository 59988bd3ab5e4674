"""Everything that `instructloop serve` puts together, on a fake engine, behind a real socket."""

import datetime as dt
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from safetensors.torch import save_file

from contracts.access import USER_SCOPES, Scope
from contracts.artifact import ArtifactStore
from contracts.events import Stamper
from contracts.log import Log
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.log.spool import SpoolSettings
from feedback.vault import open_events
from instructloop.serve import Place, create_app
from serving.access import KeyStore
from serving.settings import Settings
from tests.fakes import FakeEngine


@dataclass(frozen=True)
class House:
    """A running server: ann agreed to the notice, bob did not."""

    url: str
    app: FastAPI
    engine: FakeEngine
    keys: KeyStore
    log: Log
    registry: ReleaseRegistry

    def key(self, user: str, *scopes: Scope, **settings: Any) -> str:
        return self.keys.create(user, scopes=scopes or USER_SCOPES, **settings)[0]

    def openai(self, user: str = "ann", *scopes: Scope, **settings: Any) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key(user, *scopes, **settings), max_retries=0
        )

    def openai_async(self, user: str = "ann") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key(user), max_retries=0)

    def client(self, user: str = "ann", *scopes: Scope, **settings: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key(user, *scopes, **settings)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def events(self, topic: str) -> list[pb.Event]:
        return [record.event for record in self.log.read(topic, 0, 0, 1000)]


@contextmanager
def house(
    root: Path, settings: Settings | None = None, *, published: bool = False
) -> Iterator[House]:
    """The server, once release r1 of the model `tiny` answers, or what else was `published`."""
    place = Place(f"sqlite:///{root}/log.db", root / "registry", root / "keys.db")
    registry, log = ReleaseRegistry(place.registry), open_events(place.log)
    if not published:
        publish(registry, root)
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=notice.CURRENT.version)
    log.append([Stamper("test").event("ann", granted)])
    engine = FakeEngine()
    settings = settings or Settings(release_poll_s=0.02)
    app = create_app(place, settings, log, SpoolSettings(), engine)
    with served(app) as url:
        wait_until_ready(url)
        yield House(url, app, engine, KeyStore(place.keys), log, registry)
    log.close()


def publish(registry: ReleaseRegistry, root: Path, release_id: str = "r1") -> None:
    folder = model_folder(root / release_id)
    release = Release(
        id=release_id,
        model="tiny",
        created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        artifact=ArtifactStore(registry.root / "artifacts").put("policy", folder),
        canary=Canary(token_ids=(1, 2), logprobs=(0.0,)),
        code_version="test",
    )
    registry.publish(release)


def model_folder(folder: Path) -> Path:
    """As little as a release needs to be taken for whole."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    tensors = {"weight": torch.zeros(1), "layers.0.linear.weight": torch.zeros(2, 2)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def publish_adapter(registry: ReleaseRegistry, root: Path, release_id: str) -> None:
    """Over the release r1."""
    folder, base = root / release_id, registry.get("r1")
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["linear"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.layers.0.linear"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(1, 2),
        f"{layer}.lora_B.weight": torch.ones(2, 1),
    }
    (folder / "README.md").write_text(release_id)  # an artifact of its own
    save_file(tensors, folder / "adapter_model.safetensors")
    artifact = registry.artifacts.put("adapter", folder)
    adapted = {"id": release_id, "artifact": artifact, "base": base.artifact, "parent": "r1"}
    registry.publish(base.model_copy(update=adapted))


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app's address; the server runs on a thread and stops as by SIGTERM."""
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.02)
