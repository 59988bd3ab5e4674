"""Marker strings of people go in on every path; then every byte that was written is searched."""

import datetime as dt
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from contracts.log import follow
from contracts.release import Canary, Release, ReleaseRegistry
from feedback import notice
from feedback.dataset.build import build_dataset
from feedback.dataset.settings import RuleSettings
from feedback.importers import import_file
from feedback.rights import Rights
from feedback.vault import open_events
from serving.access import KeyStore
from tests.e2e.marker_server import place
from tests.serving.house import model_folder

RULES = RuleSettings(train_fraction=1.0, validation_fraction=0.0)
# ann agrees and stays; the others never do, do with a production key, withdraw, erase.
PEOPLE = ("ann", "never", "production", "withdrew", "erased")


def marker(user: str) -> str:
    return f"marker-of-{user}-zq"


@dataclass
class Service:
    folder: Path
    url: str
    keys: dict[str, str]

    def ask(self, user: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[user]}", **headers}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def consent(self, user: str, **body: Any) -> None:
        said = {"notice_version": notice.CURRENT.version, **body}
        headers = {"authorization": f"Bearer {self.keys[user]}"}
        httpx.put(f"{self.url}/v1/consent", json=said, headers=headers).raise_for_status()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    where = place(folder)
    registry = ReleaseRegistry(where.registry)
    model = model_folder(tmp_path_factory.mktemp("model") / "tiny")
    registry.publish(
        Release(
            id="r1",
            model="tiny",
            created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            artifact=registry.artifacts.put("policy", model),
            canary=Canary(token_ids=(1, 2), logprobs=(0.0,)),  # what the fake engine says
            code_version="test",
        )
    )
    store = KeyStore(where.keys)
    keys = {user: store.create(user, user == "production")[0] for user in PEOPLE}
    store.close()
    port, output = _free_port(), folder / "server.log"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.marker_server", str(folder), str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, output)
        yield Service(folder, url, keys)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server is not ready:\n" + output.read_text(errors="replace")[-4000:])


def speak(service: Service, user: str) -> None:
    """Send the person's marker down every path that takes text."""
    said, chat = marker(user), [{"role": "user", "content": marker(user)}]
    text = {"model": "tiny", "prompt": said, "max_tokens": 2}
    talk = {"model": "tiny", "messages": chat, "max_tokens": 2}
    shown = {
        "x-instructloop-source": "playground",
        "x-instructloop-notice": notice.CURRENT.version,
    }
    for path, body in (("/v1/completions", text), ("/v1/chat/completions", talk)):
        variants: list[dict[str, Any]] = [
            {}, {"n": 3}, {"stop": [said]}, {"stream": True}, {"metadata": {"why": said}},
            {"user": said}, {"logprobs": 2 if "prompt" in body else True}, {"model": said},
            {"temperature": said}, {said: said}, {"n": 3, "stream": True},
        ]  # fmt: skip
        for more in variants:
            service.ask(user, path, body | more)
        service.ask(user, path, body, **shown)
        _cancel(service, user, path, body | {"stream": True, "max_tokens": 5000})
    service.ask(user, "/v1/completions", text | {"echo": True})
    failing = said + " please fail"
    assert service.ask(user, "/v1/completions", text | {"prompt": failing}).status_code >= 500
    service.ask(user, "/v1/completions", text | {"prompt": failing, "stream": True})
    chat_fails = [{"role": "user", "content": failing}]
    service.ask(user, "/v1/chat/completions", talk | {"messages": chat_fails})
    service.ask(user, "/v1/chat/completions", talk | {"messages": [{"role": said, "content": 1}]})
    answer = service.ask(user, "/v1/completions", text | {"n": 2}).json()
    order = {
        "completion_id": answer["id"],
        "groups": [[0], [1]],
        "instruction_version": "1",
        "metadata": {"why": said},
    }
    service.ask(user, "/v1/feedback/rankings", order)
    service.ask(user, "/v1/feedback/rankings", order | {"groups": said, "completion_id": said})
    headers = {"authorization": f"Bearer {service.keys[user]}", "x-request-id": said}
    for path in ("/v1/models", f"/v1/models/{said}", "/metrics", "/healthz", f"/{said}?q={said}"):
        httpx.get(f"{service.url}{path}", headers=headers)
    httpx.post(f"{service.url}/v1/completions", content=said + "{", headers=headers)


def _cancel(service: Service, user: str, path: str, body: dict[str, Any]) -> None:
    """Read a little of a stream and hang up."""
    headers = {"authorization": f"Bearer {service.keys[user]}"}
    with httpx.stream("POST", f"{service.url}{path}", json=body, headers=headers) as response:
        next(response.iter_bytes(), None)


def found_in(folder: Path, text: str) -> list[str]:
    """Files below `folder` that hold `text`, in their bytes or in a Parquet file's values."""
    hits = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = file.read_bytes()
        if file.suffix == ".parquet":
            content += json.dumps(pq.read_table(file).to_pylist(), default=str).encode()
        if text.encode() in content:
            hits.append(file.name)
    return hits


def test_what_may_not_be_kept_is_nowhere(service: Service, tmp_path: Path) -> None:
    where = place(service.folder)
    for user in ("ann", "production", "withdrew", "erased"):
        service.consent(user, granted=True)
    for user in PEOPLE:
        speak(service, user)

    log = open_events(where.log)
    registry = ReleaseRegistry(where.registry)
    for user in ("author", "erased-author"):
        file = tmp_path / f"{user}.json"
        file.write_text(json.dumps([{"instruction": marker(user), "output": marker(user)}]))
        assert import_file("alpaca", file, log).events == 1
    authors = {
        r.event.demonstration.response: r.event.user_id for r in follow(log, "demonstrations", {})
    }
    before = build_dataset(log, registry.artifacts, RULES, "test")

    # The search finds what is there: who agreed is in the dataset, and nobody's words elsewhere.
    for user in ("ann", "withdrew", "erased", "author", "erased-author"):
        assert set(found_in(service.folder, marker(user))) <= {
            "ppo.parquet", "rm.parquet", "sft.parquet",
        }  # fmt: skip
        assert found_in(service.folder, marker(user))
    for user in ("never", "production"):
        assert found_in(service.folder, marker(user)) == []

    service.consent("withdrew", granted=False)
    service.consent("erased", granted=False, erase=True)
    Rights(log, log, registry).withdraw(authors[marker("erased-author")], erase=True)
    after = build_dataset(log, registry.artifacts, RULES, "test")

    for user in ("never", "production", "erased", "erased-author"):
        assert found_in(service.folder, marker(user)) == []
        assert _readable(service.folder, marker(user)) == 0
    assert "ppo.parquet" in found_in(registry.artifacts.path(after), marker("ann"))
    assert found_in(registry.artifacts.path(after), marker("withdrew")) == []
    assert "ppo.parquet" not in [p.name for p in registry.artifacts.path(before).iterdir()]
    # Nothing comes back: what is sent from now on is not kept either.
    for user in ("withdrew", "erased"):
        kept = _readable(service.folder, marker(user))
        speak(service, user)
        assert _readable(service.folder, marker(user)) == kept
    log.close()


def _readable(folder: Path, text: str) -> int:
    """Events of the log that hold `text` when they are opened with every key there is."""
    log = open_events(place(folder).log)
    topics = ("completions", "rankings", "demonstrations")
    try:
        return sum(text in str(r.event) for topic in topics for r in follow(log, topic, {}))
    finally:
        log.close()
