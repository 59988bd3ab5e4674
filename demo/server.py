"""`instructloop serve` as a child process, which ends with this one."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from contracts.errors import InstructloopError

READY_SECONDS = 300
STOP_SECONDS = 60
_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(arguments: list[str], output: Path) -> Iterator[str]:
    """Start the service with `arguments`, wait until it is ready, yield its root URL, stop it
    gracefully.

    What it prints goes to `output`. Raises InstructloopError with the end of it when the service
    does not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "instructloop.cli", "serve", "--port", str(port), *arguments]
    with output.open("ab") as sink:
        # A group of its own: Ctrl-C is for this process, which then stops the service in order.
        child = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - no other thread runs yet
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(child, url, output)
        yield url
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _end_with_parent() -> None:
    """Linux ends the child when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(child: subprocess.Popen[bytes], url: str, output: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.25)
    tail = output.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise InstructloopError(
        f"the service did not become ready; see {output}, which ends with:\n{tail}"
    )
