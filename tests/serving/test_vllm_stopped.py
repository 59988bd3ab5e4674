"""What ends a server on a real engine: the last file that uses it, by its name."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import VllmServer

pytestmark = pytest.mark.vllm


def test_engine_that_is_killed_takes_its_server_with_it(vllm_server: VllmServer) -> None:
    children = child_processes(vllm_server.pid)
    assert children
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert vllm_server.process.wait(60) != 0
    deadline = time.monotonic() + 20
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, children))


def child_processes(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def runs(pid: int) -> bool:
    """Whether it is more than an entry that nobody has collected yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
