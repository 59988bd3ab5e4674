"""Processes that a suite starts and measures from outside: `instructloop serve` and its like."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from contracts.events import Stamper
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.vault import open_events
from tests.conftest import START_BOUND_S

STOP_BOUND_S = 120
DEALT_WITH_BOUND_S = 600


@contextmanager
def started(
    command: list[str], more: Mapping[str, str], output: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """python `command` with `more` in its environment; ended by SIGTERM."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**more, **os.environ},
            cwd=Path(__file__).parents[1],
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_BOUND_S)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Wait for a 200 of `url`. Raises RuntimeError with the end of `output` where none comes."""
    deadline = time.monotonic() + START_BOUND_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=30).status_code == 200:
                return
        except httpx.TransportError:  # not listening yet
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{url} is not ready:\n" + output.read_text(errors="replace")[-4000:])


def change_to(client: httpx.Client, release_id: str) -> dict[str, Any]:
    """What became of a release that was published, once the server has dealt with it."""
    deadline = time.monotonic() + DEALT_WITH_BOUND_S
    while time.monotonic() < deadline:
        change: dict[str, Any] = client.get("/v1/releases").json()["data"][-1]
        if change["release"] == release_id:
            return change
        time.sleep(0.02)
    raise TimeoutError(f"the server did not deal with {release_id}")


def agree(log: str, user_id: str) -> None:
    """The person opts in, by the log itself."""
    with closing(open_events(log)) as events:
        granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=notice.CURRENT.version)
        events.append([Stamper("benchmark").event(user_id, granted)])


def memory_mib(pid: int) -> float:
    """Memory of a process and of all that it started that no file backs, in MiB."""
    parents = {int(p.name): _status(p, "PPid") for p in Path("/proc").glob("[0-9]*")}
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(_status(Path(f"/proc/{member}"), "RssAnon") for member in family) / 1024


def _status(process: Path, name: str) -> int:
    """A number of /proc/PID/status; 0 where the process is gone."""
    try:
        lines = (process / "status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
