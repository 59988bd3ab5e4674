import asyncio
import datetime as dt
import logging
import threading
from collections.abc import Sequence

import msgspec
import pytest

from contracts.events import Stamper
from contracts.release import Canary, Release
from contracts.v1 import events_pb2 as pb
from serving.chunk import Chunk
from serving.engine import Body, Kind
from serving.recorder import Permit, Recorder, Transcript, recordable_prompt
from tests.fakes import MemorySink

RELEASE = Release(
    id="r1",
    model="tiny",
    created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    artifact="digest",
    canary=Canary(token_ids=(1, 2), logprobs=(-0.5,)),
    code_version="test",
)
PERMIT = Permit(
    user_id="ann",
    notice_version="v1",
    source=pb.SOURCE_API,
    prompt=pb.Prompt(text="a secret question"),
    sampling=pb.Sampling(temperature=1, top_p=1, max_tokens=4),
    metadata={"use_case": "qa"},
    at=1_700_000_000.5,
)


def transcript(completion_id: str = "cmpl-1") -> Transcript:
    answer = Transcript("completions")
    choice = {"index": 0, "text": "yes", "token_ids": [5, 6], "finish_reason": "stop"}
    answer.add({"id": completion_id, "choices": [choice]})
    return answer


def chunk(completion_id: str, *choices: Body) -> Chunk:
    head = {"id": completion_id, "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    return msgspec.convert(head | {"choices": choices}, Chunk)


class SlowSink(MemorySink):
    """Fails `failures` times, then waits for `may_write`."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures, self.batches = failures, 0
        self.may_write = threading.Event()

    def append(self, events: Sequence[pb.Event]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("a secret question")
        assert self.may_write.wait(5)
        self.batches += 1
        super().append(events)


def test_event_says_what_was_asked_and_answered() -> None:
    sink = MemorySink()
    recorder = Recorder(sink, Stamper("serving", clock=lambda: 9.0))
    recorder.start()
    asyncio.run(recorder.record(PERMIT, transcript(), RELEASE))
    event = sink.events[0]  # durable when record returns
    recorder.stop()
    assert (event.user_id, event.producer, event.time.seconds) == ("ann", "serving", 1_700_000_000)
    completion = event.completion
    assert completion.completion_id == "cmpl-1"
    assert completion.prompt.text == "a secret question"
    assert completion.outputs == [
        pb.Output(index=0, text="yes", token_ids=[5, 6], finish_reason="stop")
    ]
    assert (completion.release_id, completion.release_digest) == ("r1", "digest")
    assert completion.notice_version == "v1" and completion.metadata == {"use_case": "qa"}


def test_chunks_of_several_outputs_are_put_together() -> None:
    answer = Transcript("chat")
    for index, text, end in [(1, "b", None), (0, "a", None), (1, "B", "stop"), (0, "A", "length")]:
        delta = {"content": text}
        choice = {"index": index, "delta": delta, "token_ids": [index], "finish_reason": end}
        answer.hear(chunk("chatcmpl-1", choice))
    answer.hear(chunk("chatcmpl-1"))
    outputs = answer.event_body(PERMIT, RELEASE).outputs
    assert outputs == [
        pb.Output(index=0, text="aA", token_ids=[0, 0], finish_reason="length"),
        pb.Output(index=1, text="bB", token_ids=[1, 1], finish_reason="stop"),
    ]


@pytest.mark.parametrize(
    ("kind", "body", "recordable"),
    [
        ("completions", {"prompt": "text"}, True),
        ("completions", {"prompt": "text", "echo": True}, False),
        ("completions", {"prompt": ""}, False),
        ("completions", {"prompt": ["one", "two"]}, False),
        ("completions", {"prompt": [1, 2]}, False),
        ("completions", {}, False),
        ("chat", {"messages": [{"role": "user", "content": "hi"}]}, True),
        ("chat", {"messages": [{"role": "user", "content": "hi", "name": None}]}, True),
        ("chat", {"messages": [{"role": "user", "content": "hi", "name": "ann"}]}, False),
        ("chat", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, False),
        ("chat", {"messages": [{"role": "tool", "content": "hi"}]}, False),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, False),
        ("chat", {"messages": []}, False),
        ("chat", {"messages": "hi"}, False),
        ("chat", {"messages": [3]}, False),
        ("chat", {}, False),
    ],
)
def test_what_an_event_can_say(kind: Kind, body: Body, recordable: bool) -> None:
    assert (recordable_prompt(kind, body) is not None) == recordable


def test_slow_log_holds_an_answer_back_for_the_bound_and_loses_nothing() -> None:
    sink = SlowSink()
    recorder = Recorder(sink, Stamper("serving"), wait_s=0.05)
    recorder.start()
    asyncio.run(recorder.record(PERMIT, transcript(), RELEASE))
    assert sink.events == []
    sink.may_write.set()
    recorder.stop()
    assert len(sink.events) == 1 and recorder.lost == 0


def test_events_that_wait_are_written_together() -> None:
    async def scene(recorder: Recorder) -> None:
        await recorder.record(PERMIT, transcript("cmpl-0"), RELEASE)
        asks = [recorder.record(PERMIT, transcript(f"cmpl-{i}"), RELEASE) for i in range(1, 9)]
        await asyncio.gather(*asks)

    sink = SlowSink()
    recorder = Recorder(sink, Stamper("serving"), wait_s=0.05)
    recorder.start()
    asyncio.run(scene(recorder))
    sink.may_write.set()
    recorder.stop()
    assert len(sink.events) == 9
    assert sink.batches == 2


def test_log_that_fails_for_a_moment_is_tried_again() -> None:
    sink = SlowSink(failures=2)
    pauses: list[float] = []
    sink.may_write.set()
    recorder = Recorder(sink, Stamper("serving"), pause=pauses.append)
    recorder.start()
    asyncio.run(recorder.record(PERMIT, transcript(), RELEASE))
    recorder.stop()
    assert len(sink.events) == 1 and recorder.lost == 0
    assert len(pauses) == 2


def test_lost_completion_is_counted_and_its_text_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = SlowSink(failures=3)
    recorder = Recorder(sink, Stamper("serving"), pause=lambda seconds: None)
    recorder.start()
    with caplog.at_level(logging.DEBUG):
        asyncio.run(recorder.record(PERMIT, transcript(), RELEASE))
        recorder.stop()
    assert recorder.lost == 1 and sink.events == []
    assert "1 completion(s) not recorded" in caplog.text
    assert "secret" not in caplog.text


def test_full_queue_loses_the_event_and_not_the_answer() -> None:
    recorder = Recorder(SlowSink(), Stamper("serving"), wait_s=0.01, capacity=1)  # never started
    asyncio.run(recorder.record(PERMIT, transcript("cmpl-1"), RELEASE))
    asyncio.run(recorder.record(PERMIT, transcript("cmpl-2"), RELEASE))
    assert recorder.lost == 1
