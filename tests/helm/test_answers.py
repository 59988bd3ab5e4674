"""What the chart's test pod runs, on a server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_a_server_that_was_not_there_yet_lists_no_key_in_its_log(tmp_path: Path) -> None:
    """The file of keys that the chart's first container makes keeps a server from making one."""
    keys = tmp_path / "keys.db"
    command = [sys.executable, "-m", "instructloop.cli", "keys", "list", "--keys", str(keys)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout == "" and keys.exists()
