"""How a server ends: `instructloop serve` as its supervisor sees it, on a fake engine."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from contracts.events import Stamper
from contracts.release import ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.vault import open_events
from serving.access import KeyStore
from tests.conftest import free_port, wait_until_ready
from tests.instructloop.held_server import place
from tests.serving.house import publish

ASK = {"model": "tiny", "prompt": "say", "max_tokens": 8, "stream": True}


@dataclass(frozen=True)
class Held:
    """A running server, and the folder with its log."""

    folder: Path
    port: int
    process: "subprocess.Popen[bytes]"
    client: httpx.Client

    def terminate(self) -> None:
        """Ask it to end; returns once it takes nobody in any more."""
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except ConnectionRefusedError:
                return
            time.sleep(0.05)
        raise AssertionError("the port is open still")

    def recorded(self) -> list[pb.Completion]:
        with closing(open_events(place(self.folder).log)) as log:
            return [record.event.completion for record in log.read("completions", 0, 0, 10)]


@contextmanager
def held(folder: Path, bound_s: int) -> Iterator[Held]:
    where, port, output = place(folder), free_port(), folder / "server.log"
    publish(ReleaseRegistry(where.registry), folder)
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=notice.CURRENT.version)
    with closing(open_events(where.log)) as log:
        log.append([Stamper("test").event("ann", granted)])
    key, _ = KeyStore(where.keys).create("ann")
    command = [sys.executable, "-m", "tests.instructloop.held_server", str(folder), str(port)]
    with output.open("wb") as file:
        process = subprocess.Popen([*command, str(bound_s)], stdout=file, stderr=file)
    url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {key}"}
    try:
        wait_until_ready(url, process, output)
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield Held(folder, port, process, client)
    finally:
        process.kill()
        process.wait()


def test_what_is_in_flight_is_finished_and_recorded(tmp_path: Path) -> None:
    with held(tmp_path, bound_s=60) as server:
        with server.client.stream("POST", "/v1/completions", json=ASK) as answer:
            lines = (line for line in answer.iter_lines() if line)
            said = [next(lines)]
            server.terminate()
            (tmp_path / "go").touch()
            said += lines
        assert server.process.wait(60) == 0
        assert said.pop() == "data: [DONE]"
        words = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in said]
        assert len(words) == 8
        (completion,) = server.recorded()
        assert completion.outputs[0].text == "".join(words)


def test_what_outlasts_the_bound_is_cut_and_not_recorded(tmp_path: Path) -> None:
    with held(tmp_path, bound_s=1) as server:
        with server.client.stream("POST", "/v1/completions", json=ASK) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.terminate()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.process.wait(60) == 0
        assert server.recorded() == []


def test_a_dead_engine_is_a_failure_of_the_process(tmp_path: Path) -> None:
    with held(tmp_path, bound_s=1) as server:
        (tmp_path / "broken").touch()
        assert server.process.wait(60) == 1
