"""What the chart's test pod runs, on a server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port
from tests.helm.conftest import CHART
from tests.serving.house import House, house


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("house")) as running:
        yield running


def ask(server: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    script = (CHART / "files" / "answers.py").read_text(encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SERVER": server, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_ready_server_passes_with_and_without_a_key(here: House) -> None:
    without = ask(here.url)
    assert without.returncode == 0 and '"ready"' in without.stdout
    answered = ask(here.url, KEY=here.key("ann"))
    assert answered.returncode == 0 and "completion_tokens" in answered.stdout


def test_a_wrong_key_fails(here: House) -> None:
    assert "401" in ask(here.url, KEY="il-wrong").stderr


def test_a_server_that_is_not_ready_fails(here: House) -> None:
    with here.client("ann", "admin") as client:
        client.post("/v1/admin/drain").raise_for_status()
        failed = ask(here.url)
        client.post("/v1/admin/undrain").raise_for_status()
    assert failed.returncode == 1 and "503" in failed.stderr


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", False), ("127.0.0.1", True)])  # noqa: S104
def test_a_server_with_no_key_yet_prints_one_on_this_machine_and_none_in_a_pod(
    tmp_path: Path, host: str, told: bool
) -> None:
    """As the chart starts it, it would stay in a pod's log."""
    port, keys = free_port(), ["--keys", str(tmp_path / "keys.db")]
    places = ["--log", f"sqlite:///{tmp_path}/log.db", "--registry", str(tmp_path / "registry")]
    words = [sys.executable, "-m", "instructloop.cli"]
    serve = [*words, "serve", "--host", host, "--port", str(port), *keys, *places]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/healthz", server)
        finally:
            server.terminate()
        printed, _ = server.communicate(timeout=60)
    listed = subprocess.run([*words, "keys", "list", *keys], capture_output=True, check=True)
    assert ("#key=il-" in printed, bool(listed.stdout)) == (told, told)


def wait_until_ready(url: str, server: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")
