"""What the process of an engine runs: it does what the trainer asks for, until that is gone.

Imports little, as every process does so anew.
"""

import ctypes
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from training.memory import Layout, Memory

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Drawn:
    """Of some prompts the responses to each, as Sampled; and the version of the weights that they
    were drawn on.
    """

    version: int | None
    responses: list[list[Any]]


@dataclass(frozen=True)
class Failure:
    """What was raised, and where."""

    text: str
    trace: str


def serve(connection: Connection, trainer: int, memory: Memory, make: Callable[..., Any]) -> None:
    """Answer questions, each a name of Served with arguments, with what it gives or a Failure."""
    # However the trainer ends, and whatever is done here then.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    served = Served(memory, make)
    while os.getppid() == trainer:
        try:
            what, arguments = connection.recv()
        except EOFError:
            served.end()
            return
        try:
            answer = getattr(served, what)(*arguments)
        except Exception as e:  # noqa: BLE001  whatever it is, the trainer raises it
            answer = Failure(f"{type(e).__name__}: {e}", traceback.format_exc())
        connection.send(answer)


class Served:
    """An engine and the version of its weights, which have none while they change."""

    def __init__(self, memory: Memory, make: Callable[..., Any]) -> None:
        self._memory, self._make = memory, make
        self._version: int | None = None

    def start(self) -> None:
        self._engine = self._make()
        self._version = 0

    def load(self, layout: Layout) -> None:
        self._version = None
        self._engine.load(self._memory.read(layout))

    def transfer(self, step: str, *args: Any) -> None:
        """A step of vLLM's weight transfer."""
        self._version = None
        self._engine.transfer(step, *args)

    def label(self, version: int) -> None:
        """Say of which version the weights are that came last."""
        self._version = version

    def end(self) -> None:
        self._engine.close()

    def sample(self, *args: Any) -> Drawn:
        return Drawn(self._version, self._engine.sample(*args))
