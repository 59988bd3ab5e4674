"""Session fixtures: a server on a real vLLM engine, and tiny models to serve."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import settings

from contracts.release import Release, ReleaseRegistry
from tests import tiny_models
from tests.fakes import FileSink
from tests.kafka import kafka, kafka_parts, kcat

__all__ = ["kafka", "kafka_parts", "kcat", "vllm_server"]

START_BOUND_S = 600

# How long an example takes says nothing of whether it holds.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@dataclass(frozen=True)
class VllmServer:
    """A running server and everything around it. `folders` maps release ids to model folders."""

    url: str
    registry: ReleaseRegistry
    sink: FileSink
    log: Path
    process: "subprocess.Popen[bytes]"
    tied: bool
    releases: list[Release]
    folders: dict[str, Path]

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, user: str) -> httpx.Client:
        headers = {"authorization": f"Bearer il-{user}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def wait_for(self, release_id: str) -> None:
        """Until the server has dealt with the release, one way or another."""
        deadline = time.monotonic() + 60
        with self.client("bob") as client:
            while time.monotonic() < deadline:
                changes = client.get("/v1/releases").json()["data"]
                if changes and changes[-1]["release"] == release_id:
                    return
                time.sleep(0.05)
        raise AssertionError(f"the server did not deal with {release_id}; its log: {self.log}")


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def vllm_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A server on release 0 of three; one engine at a time, stopped by SIGTERM at the end."""
    root = tmp_path_factory.mktemp("tied" if request.param else "untied")
    registry = ReleaseRegistry(root / "registry")
    releases, folders = [], {}
    for seed in range(3):
        folder = tiny_models.save(root / f"model{seed}", seed, tied=request.param)
        release = tiny_models.release(registry, folder, f"r{seed}")
        releases.append(release)
        folders[release.id] = folder
    registry.publish(releases[0])
    with running_server(root, registry) as (url, sink, process):
        log = root / "server.log"
        yield VllmServer(url, registry, sink, log, process, request.param, releases, folders)


@contextmanager
def running_server(
    root: Path, registry: ReleaseRegistry, max_adapters: int = 0
) -> "Iterator[tuple[str, FileSink, subprocess.Popen[bytes]]]":
    """A server that is ready, and is stopped by SIGTERM at the end; its log is in `root`."""
    port, sink, log = free_port(), FileSink(root / "events"), root / "server.log"
    process = start_server(registry.root, port, sink.path, log, max_adapters)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        yield url, sink, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def start_server(
    registry: Path, port: int, events: Path, log: Path, max_adapters: int = 0
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.serving.server_process", str(registry), str(port)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, str(events), str(max_adapters)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_BOUND_S
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready(url):
            return
        time.sleep(0.2)
    raise AssertionError("the server is not ready:\n" + log.read_text(errors="replace")[-4000:])


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=30).status_code == 200
    except httpx.TransportError:  # not listening yet
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
