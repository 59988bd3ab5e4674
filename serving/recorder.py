"""Recorder: finished completion > Completion event > sink."""

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from contracts.events import Stamper
from contracts.log import EventSink
from contracts.release import Release
from contracts.v1 import events_pb2 as pb
from serving.chunk import Chunk
from serving.engine import Body, Kind

log = logging.getLogger(__name__)

BATCH = 512
ATTEMPTS = 3
RECORDED_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Permit:
    """What may be recorded of a request, decided when it came: its owner agreed, and we can say it
    exactly.
    """

    user_id: str
    notice_version: str
    source: pb.Source
    prompt: pb.Prompt
    sampling: pb.Sampling
    metadata: dict[str, str]
    # When consent was asked, in seconds since 1970: who withdraws while the answer is made takes it
    # back, too, also where they agree again later.
    at: float


@dataclass
class _Output:
    """One answer as far as it is heard."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    # Where the answers are of several releases.
    release_id: str = ""
    release_digest: str = ""


@dataclass
class Transcript:
    """What was answered, put together from a whole body or from the chunks of a stream."""

    kind: Kind
    completion_id: str = ""
    outputs: defaultdict[int, _Output] = field(default_factory=lambda: defaultdict(_Output))

    def add(self, body: Body) -> None:
        """A whole body as the engine gave it, with token ids."""
        self.completion_id = body["id"]
        for choice in body["choices"]:
            said = choice if self.kind == "completions" else choice.get("message") or {}
            text = said.get("text" if self.kind == "completions" else "content") or ""
            self.outputs[choice["index"]] = _Output(
                [text],
                list(choice.get("token_ids") or ()),
                choice.get("finish_reason") or "",
                choice.get("release", ""),
                choice.get("release_digest", ""),
            )

    def hear(self, chunk: Chunk) -> None:
        """A chunk as the engine gave it, with token ids."""
        self.completion_id = chunk.id
        for choice in chunk.choices:
            output = self.outputs[choice.index]
            output.texts.append(choice.said)
            output.token_ids += choice.token_ids or ()
            output.finish_reason = choice.finish_reason or output.finish_reason

    def event_body(self, permit: Permit, release: Release) -> pb.Completion:
        return pb.Completion(
            completion_id=self.completion_id,
            prompt=permit.prompt,
            outputs=[self._output(index) for index in sorted(self.outputs)],
            sampling=permit.sampling,
            release_id=release.id,
            release_digest=release.artifact,
            source=permit.source,
            notice_version=permit.notice_version,
            metadata=permit.metadata,
            model=release.model,
        )

    def _output(self, index: int) -> pb.Output:
        output = self.outputs[index]
        return pb.Output(
            index=index,
            text="".join(output.texts),
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            release_id=output.release_id,
            release_digest=output.release_digest,
        )


def recordable_prompt(kind: Kind, body: Body) -> pb.Prompt | None:
    """The prompt as it was sent; None for what an event cannot say exactly, which is answered and
    not recorded.

    That is: token ids or several prompts in one request, an answer that repeats the prompt, and
    messages other than plain text of system, user and assistant.
    """
    if kind == "completions":
        text = body.get("prompt")
        return (
            pb.Prompt(text=text)
            if isinstance(text, str) and text and not body.get("echo")
            else None
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_plain, messages)):
        return None
    return pb.Prompt(messages=[pb.Message(role=m["role"], content=m["content"]) for m in messages])


def _is_plain(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and {name for name in message if message[name] is not None} == {"role", "content"}
        and message["role"] in RECORDED_ROLES
        and isinstance(message["content"], str)
    )


# True once the event is durable, False where nobody waits any longer.
_Written = asyncio.Future[bool]


def _wake(batch: list[_Written]) -> None:
    """Tell who waits that the event is durable; each loop is woken once for all of its own."""
    for loop in {written.get_loop() for written in batch}:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            own = [written for written in batch if written.get_loop() is loop]
            loop.call_soon_threadsafe(_settle, own, True)


def _settle(batch: list[_Written], durable: bool) -> None:
    for written in batch:
        if not written.done():
            written.set_result(durable)


class Recorder:
    """Writes events on a thread of its own, all that wait in one batch, so that a flush to disk is
    shared.

    A slow log holds a response back for `wait_s` at most; a log that fails, or is `capacity` events
    behind, loses events and says so in the process's own log, without their text.
    """

    def __init__(
        self,
        sink: EventSink,
        stamper: Stamper,
        wait_s: float = 1.0,
        capacity: int = 10_000,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sink, self._stamper, self._wait_s, self._pause = sink, stamper, wait_s, pause
        self._queue: queue.SimpleQueue[tuple[pb.Event, _Written] | None] = queue.SimpleQueue()
        self._capacity = capacity
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        # Completions that were promised to be recorded and are not in the log.
        self.lost = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what still waits, then return."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    async def record(self, permit: Permit, transcript: Transcript, release: Release) -> None:
        """Returns when the event is durable, or after the bound; never raises."""
        loop = asyncio.get_running_loop()
        written: _Written = loop.create_future()
        try:
            body = transcript.event_body(permit, release)
            event = self._stamper.event(permit.user_id, body, at=permit.at)
        except Exception as e:  # noqa: BLE001  recording never fails an answer
            self._lose(1, e)
            return
        if self._queue.qsize() >= self._capacity:
            self._lose(1, queue.Full())
            return
        self._queue.put((event, written))
        bound = loop.call_later(self._wait_s, _settle, [written], False)
        try:
            durable = await written
        finally:
            bound.cancel()
        if not durable:
            log.warning("completion answered before its event was durable: the log is slow")

    def _write(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < BATCH and not self._queue.empty():
                if (waiting := self._queue.get()) is None:
                    last = True
                    break
                batch.append(waiting)
            self._append([event for event, _ in batch])
            _wake([written for _, written in batch])
            if last:
                return

    def _append(self, events: list[pb.Event]) -> None:
        """An event keeps its id over the attempts, so what an attempt did write is not counted
        twice.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._sink.append(events)
                return
            except Exception as e:  # noqa: BLE001  whatever the log's client raises
                log.warning(
                    "log write failed, attempt %d of %d: %s", attempt, ATTEMPTS, type(e).__name__
                )
                if attempt == ATTEMPTS:
                    self._lose(len(events), e)
                else:
                    self._pause(0.1 * 4**attempt)

    def _lose(self, count: int, error: Exception) -> None:
        self.lost += count
        log.error(
            "%d completion(s) not recorded (%d in all): %s", count, self.lost, type(error).__name__
        )
