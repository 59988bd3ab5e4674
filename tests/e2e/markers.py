"""Marker strings of people go in on every path; then every byte that was written is searched."""

import datetime as dt
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from contracts.events import TEXT_BODIES, TOPIC_OF
from contracts.log import follow
from contracts.release import Canary, Release, ReleaseRegistry
from feedback import notice
from feedback.dataset.build import build_dataset
from feedback.dataset.settings import RuleSettings
from feedback.importers import import_file
from feedback.rights import Rights
from feedback.vault import open_events
from feedback.vault.sealed import SealedLog
from serving.access import KeyStore
from tests.e2e.marker_server import place
from tests.serving.house import model_folder

RULES = RuleSettings(train_fraction=1.0, validation_fraction=0.0)
# ann agrees and stays; the others never do, do with a production key, withdraw, erase.
PEOPLE = ("ann", "never", "production", "withdrew", "erased")
AUTHORS = ("author", "erased-author")
# Whose words may be nowhere at the end: those of `later` were said after the person took it back.
FORBIDDEN = (
    *("never", "production", "erased", "erased-author"),
    *("withdrew-later", "erased-later"),
)
# Whose words may be in datasets, and sealed in the log.
KEPT = ("ann", "withdrew", "author")
DATASET = {"ppo.parquet", "rm.parquet", "sft.parquet"}


def marker(whose: str) -> str:
    return f"marker-of-{whose}-zq"


@dataclass
class Service:
    """A running server and what was asked of it."""

    folder: Path
    url: str
    keys: dict[str, str]
    client: httpx.Client
    requests: int = 0

    def send(
        self, user: str, method: str, path: str, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        self.requests += 1
        headers = {"authorization": f"Bearer {self.keys[user]}", **(headers or {})}
        return self.client.request(method, f"{self.url}{path}", headers=headers, **more)

    def ask(self, user: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.send(user, "POST", path, headers, json=body)

    def consent(self, user: str, **body: Any) -> None:
        said = {"notice_version": notice.CURRENT.version, **body}
        self.send(user, "PUT", "/v1/consent", json=said).raise_for_status()

    def hang_up(self, user: str, path: str, body: dict[str, Any]) -> None:
        """Read a little of a stream and leave."""
        self.requests += 1
        headers = {"authorization": f"Bearer {self.keys[user]}"}
        with self.client.stream("POST", f"{self.url}{path}", json=body, headers=headers) as answer:
            next(answer.iter_bytes(), None)


@dataclass(frozen=True)
class Search:
    """What was looked for, where, and which markers were found, each with the place."""

    leaked: dict[str, str]
    markers: int
    requests: int
    bytes: int


def search(folder: Path, *, careless: bool = False) -> Search:
    """The whole story, and what of it may not be there and is. A `careless` server logs prompts."""
    with running(folder / "service", careless) as service:
        after = live(service, folder)
        shown = service.send("metrics", "GET", "/metrics").raise_for_status().text
        (service.folder / "metrics").write_text(shown, encoding="utf-8")
    leaked, size = leaks(service.folder, FORBIDDEN)
    leaked |= leaks(after, ["withdrew"])[0]
    for kept in KEPT:
        if astray := set(found_in(service.folder, marker(kept))) - DATASET:
            leaked[marker(kept)] = min(astray)
    return Search(leaked, len(FORBIDDEN) + len(KEPT), service.requests, size)


def live(service: Service, folder: Path) -> Path:
    """People agree, speak, take it back and speak again; the folder of the dataset built last."""
    where = place(service.folder)
    registry = ReleaseRegistry(where.registry)
    for user in PEOPLE:
        if user != "never":
            service.consent(user, granted=True)
        speak(service, user, marker(user))
    with closing(open_events(where.log)) as log:
        for author in AUTHORS:
            file = folder / f"{author}.json"
            row = {"instruction": marker(author), "output": marker(author)}
            file.write_text(json.dumps([row]), encoding="utf-8")
            import_file("alpaca", file, log)
        build_dataset(log, registry.artifacts, RULES, "test")
        for kept in ("ann", "withdrew", "erased", *AUTHORS):  # the search finds what is there
            if not DATASET & set(found_in(service.folder, marker(kept))):
                raise AssertionError(f"the words of {kept} are not in the dataset")
        service.consent("withdrew", granted=False)
        service.consent("erased", granted=False, erase=True)
        author = _author(log, marker("erased-author"))
        Rights(log, log, registry).withdraw(author, erase=True)
        for user in ("withdrew", "erased"):
            speak(service, user, marker(f"{user}-later"))
        after = registry.artifacts.path(build_dataset(log, registry.artifacts, RULES, "test"))
    if "ppo.parquet" not in found_in(after, marker("ann")):
        raise AssertionError("the words of who stayed are not in the dataset")
    return after


def _author(log: SealedLog, said: str) -> str:
    events = (record.event for record in follow(log, "demonstrations", {}))
    return next(event.user_id for event in events if event.demonstration.response == said)


def speak(service: Service, user: str, said: str) -> None:
    """Send the text down every path that takes text."""
    chat = [{"role": "user", "content": said}]
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
        service.hang_up(user, path, body | {"stream": True, "max_tokens": 5000})
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
    for path in ("/v1/models", f"/v1/models/{said}", "/metrics", "/healthz", f"/{said}?q={said}"):
        service.send(user, "GET", path, {"x-request-id": said})
    service.send(user, "POST", "/v1/completions", content=said + "{")


def leaks(folder: Path, whose: Iterable[str]) -> tuple[dict[str, str], int]:
    """Markers with where they are, in files or in what the log's keys open; bytes searched."""
    contents = {file.name: _content(file) for file in _files(folder)}
    if (folder / "log.db").exists():
        contents["events"] = _readable(folder)
    found = {
        marker(one): name
        for one in whose
        for name, content in contents.items()
        if marker(one).encode() in content
    }
    return found, sum(map(len, contents.values()))


def found_in(folder: Path, text: str) -> list[str]:
    """Files below `folder` that hold `text`, in their bytes or in a Parquet file's values."""
    return [file.name for file in _files(folder) if text.encode() in _content(file)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".parquet":
        content += json.dumps(pq.read_table(file).to_pylist(), default=str).encode()
    return content


def _readable(folder: Path) -> bytes:
    """Every event of the log, opened with every key there is."""
    with closing(open_events(place(folder).log)) as log:
        topics = [TOPIC_OF[body] for body in TEXT_BODIES]
        return "\n".join(str(r.event) for t in topics for r in follow(log, t, {})).encode()


@contextmanager
def running(folder: Path, careless: bool = False) -> Iterator[Service]:
    """The server as a process, with a collector of its traces; all that they write is in `folder`,
    the server's output too.
    """
    folder.mkdir()
    where = place(folder)
    _publish(ReleaseRegistry(where.registry), model_folder(folder.parent / "tiny"))
    store = KeyStore(where.keys)
    keys = {user: store.create(user, user == "production")[0] for user in PEOPLE}
    keys["metrics"] = store.create("metrics", scopes=("metrics",))[0]
    store.close()
    port, output = _free_port(), folder / "server.log"
    with _collector(folder / "traces") as traces, output.open("wb") as stream:
        command = [sys.executable, "-m", "tests.e2e.marker_server", str(folder), str(port), traces]
        process = subprocess.Popen(
            [*command, *(["careless"] if careless else [])],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            with httpx.Client(timeout=60) as client:
                service = Service(folder, f"http://127.0.0.1:{port}", keys, client)
                _wait_until_ready(service, process, output)
                yield service
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _publish(registry: ReleaseRegistry, model: Path) -> None:
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


class _Traces(BaseHTTPRequestHandler):
    """Writes down what an exporter of spans sends."""

    def __init__(self, file: Path, *arguments: Any) -> None:
        self.file = file
        super().__init__(*arguments)

    def do_POST(self) -> None:
        with self.file.open("ab") as file:
            file.write(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def _collector(file: Path) -> Iterator[str]:
    """The address of a collector of traces."""
    with HTTPServer(("127.0.0.1", 0), partial(_Traces, file)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        finally:
            server.shutdown()
            thread.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(service: Service, process: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if service.client.get(f"{service.url}/readyz", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server is not ready:\n" + output.read_text(errors="replace")[-4000:])
