"""Engines: who does the part of a build that is done event by event, and at which log."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeVar

from contracts.log import EventSource

Task = TypeVar("Task")
Result = TypeVar("Result")

# Opens the log and its vault, in whichever process; it is pickled.
Reopen = Callable[[], EventSource]


class Engine(Protocol):
    """Maps work over tasks. What a task and its result are made of can be pickled."""

    def map(
        self, work: Callable[[EventSource, Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        """One result a task, in the order of the tasks."""
        ...


class Here:
    """In this process, one after the other."""

    def __init__(self, source: EventSource) -> None:
        self._source = source

    def map(
        self, work: Callable[[EventSource, Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        return (work(self._source, task) for task in tasks)


class Processes:
    """In so many processes of this machine; each opens the log itself. A context manager."""

    def __init__(self, reopen: Reopen, count: int) -> None:
        # Fresh processes: a fork would share the log's connections.
        self._pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _open, (reopen,)
        )

    def map(
        self, work: Callable[[EventSource, Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        return self._pool.map(partial(_work, work), tasks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


_opened: list[EventSource] = []


def _open(reopen: Reopen) -> None:
    _opened[:] = [reopen()]


def _work(work: Callable[[EventSource, Task], Result], task: Task) -> Result:
    return work(_opened[0], task)
