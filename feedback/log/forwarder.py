"""A thread that sends what waits in the spool to the log, whatever happens to the log."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Protocol, TypeAlias

from feedback.log.spool import Row, Spool

log = logging.getLogger(__name__)

BATCH = 500
# Rows on their way at a time. The client has no bound of its own.
IN_FLIGHT = 4000
# How soon a row that just came is seen.
_IDLE_S = 0.01

_Answers: TypeAlias = "queue.SimpleQueue[tuple[Row, Exception | None]]"


class Sender(Protocol):
    """Sends to a log; one is thrown away after its first failure."""

    def send(
        self, topic: str, key: bytes, value: bytes, done: Callable[[Exception | None], None]
    ) -> None:
        """Calls `done` once, from any thread, when the record is durable or has failed. May forget
        to.
        """
        ...

    def close(self) -> None:
        """At once, whatever is on its way."""
        ...


class Stalled(Exception):
    """Nothing was acknowledged for too long."""


class Forwarder:
    """Sends in the order in which rows came, many at a time, and forgets what is acknowledged.

    A sender that fails, or is silent for `stall_s`, is replaced, and what it left unacknowledged is
    sent again: the log shows an id once.
    """

    def __init__(
        self,
        spool: Spool,
        open_sender: Callable[[], Sender],
        stall_s: float = 10.0,
        pause_s: float = 1.0,
    ) -> None:
        self._spool, self._open = spool, open_sender
        self._stall_s, self._pause_s = stall_s, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        # Rows that the log has acknowledged.
        self.forwarded = 0
        # Why nothing is forwarded now; None while all is well.
        self.trouble: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, bound_s: float = 5.0) -> None:
        """Send what waits for at most `bound_s`; the rest stays in the spool."""
        deadline = time.monotonic() + bound_s
        while self.trouble is None and self._spool.oldest() and time.monotonic() < deadline:
            time.sleep(_IDLE_S)
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with closing(self._open()) as sender:
                    self._forward(sender)
            except Exception as e:  # noqa: BLE001  whatever the client raises: the rows are safe
                self._note(type(e).__name__)
                self._stop.wait(self._pause_s)

    def _forward(self, sender: Sender) -> None:
        answers: _Answers = queue.SimpleQueue()
        on_their_way, sent, heard = 0, 0, time.monotonic()
        while not self._stop.is_set():
            room = min(BATCH, IN_FLIGHT - on_their_way)
            rows = self._spool.waiting(sent, room) if room else []
            if rows and not on_their_way:
                heard = time.monotonic()
            for row in rows:
                sender.send(row.topic, row.user.encode(), row.event, _answer(answers, row))
                sent, on_their_way = row.seq, on_their_way + 1
            done, failure = _heard(answers, wait=not rows)
            if done:
                self._spool.forget(done)
                on_their_way -= len(done)
                self.forwarded += len(done)
                heard = time.monotonic()
            if failure is not None:
                raise failure
            if done:
                self._recovered()
            elif on_their_way and time.monotonic() - heard > self._stall_s:
                raise Stalled

    def _note(self, trouble: str) -> None:
        """The first time of each kind: an outage of hours is a line, not a thousand."""
        if trouble != self.trouble:
            self.trouble = trouble
            status = self._spool.status()
            log.error("events wait in the spool, %d by now: %s", status.depth, trouble)

    def _recovered(self) -> None:
        if self.trouble is not None:
            log.warning("events are forwarded again; %d wait", self._spool.status().depth)
            self.trouble = None


def _answer(answers: _Answers, row: Row) -> Callable[[Exception | None], None]:
    return lambda error: answers.put((row, error))


def _heard(answers: _Answers, wait: bool) -> tuple[list[Row], Exception | None]:
    """The rows that were acknowledged since, and the first error."""
    done, failure = list[Row](), None
    try:
        row, error = answers.get(timeout=_IDLE_S) if wait else answers.get_nowait()
        while True:
            if error is None:
                done.append(row)
            failure = failure or error
            row, error = answers.get_nowait()
    except queue.Empty:
        return done, failure
