"""Spark: the same build on Apache Spark, where one machine is too slow (pip install pyspark).

The workers need this code, and reach the log and the vault by the same names as the driver.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from pyspark.sql import SparkSession

from contracts.log import EventSource
from feedback.dataset.engine import Reopen

Task = TypeVar("Task")
Result = TypeVar("Result")


class Spark:
    """feedback.dataset.engine.Engine on the cluster at `master`, as `spark://HOST:7077` or
    `local[2]`. A context manager.
    """

    def __init__(self, reopen: Reopen, master: str) -> None:
        self._reopen = reopen
        # The driver's Python, where the workers' is not said to be elsewhere.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        self._session = (
            SparkSession.builder.master(master)
            .appName("instructloop dataset")
            .config("spark.ui.enabled", "false")
            .getOrCreate()
        )

    def map(
        self, work: Callable[[EventSource, Task], Result], tasks: Sequence[Task]
    ) -> Iterator[Result]:
        if not tasks:
            return iter(())
        spread = self._session.sparkContext.parallelize(tasks, len(tasks))
        done: Iterator[Result] = spread.mapPartitions(
            partial(_work, self._reopen, work)
        ).toLocalIterator(prefetchPartitions=True)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._session.stop()


def _work(
    reopen: Reopen, work: Callable[[EventSource, Task], Result], tasks: Iterable[Task]
) -> Iterator[Result]:
    source = reopen()
    try:
        for task in tasks:
            yield work(source, task)
    finally:
        source.close()  # type: ignore[attr-defined]
