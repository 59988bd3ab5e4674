"""What ends a server on a real engine: the last file that uses it, by its name."""

import json
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import VllmServer

pytestmark = pytest.mark.vllm


def test_engine_that_ends_takes_its_server_with_it_and_finishes_no_half_answer(
    vllm_server: VllmServer,
) -> None:
    """Killed, or by SIGTERM, at which vLLM calls what it breaks off finished."""
    children, events = child_processes(vllm_server.pid), list[str]()
    # What a terminal sends at Ctrl-C is for the server alone, which has answers to finish.
    assert [child for child in children if os.getpgid(child) == child]
    recorded = len(vllm_server.sink.events())
    ask = {"model": "tiny", "prompt": "Write", "max_tokens": 200, "ignore_eos": True}
    with httpx.stream(
        "POST",
        f"{vllm_server.url}/v1/completions",
        headers={"authorization": "Bearer il-ann"},
        json=ask | {"stream": True},
        timeout=60,
    ) as answer:
        for line in filter(None, answer.iter_lines()):
            events.append(line.removeprefix("data: "))
            if len(events) == 3:
                for child in children:
                    os.kill(child, signal.SIGTERM if vllm_server.tied else signal.SIGKILL)
    *_, told, end = events
    assert end == "[DONE]" and json.loads(told)["error"]["type"] == "server_error", told
    assert len(vllm_server.sink.events()) == recorded

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
