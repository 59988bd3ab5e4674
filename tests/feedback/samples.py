"""Valid events with as little in them as the schema allows, for the tests of feedback."""

import uuid
from collections.abc import Iterable, Sequence

from contracts.events import Stamper
from contracts.v1 import events_pb2 as pb

STAMPER = Stamper("test")


def number(n: int) -> str:
    """A UUID that sorts by `n`."""
    return str(uuid.UUID(int=(7 << 76) | (0b10 << 62) | n | (n << 80)))


def consent(
    user_id: str, *, granted: bool = True, version: str = "1", at: float | None = None
) -> pb.Event:
    state = pb.CONSENT_STATE_GRANTED if granted else pb.CONSENT_STATE_WITHDRAWN
    return STAMPER.event(user_id, pb.Consent(state=state, notice_version=version), at=at)


def completion(
    user_id: str,
    completion_id: str,
    prompt: str = "hello",
    texts: Sequence[str] = ("a", "b", "c"),
    *,
    n: int | None = None,
    at: float | None = None,
    source: pb.Source = pb.SOURCE_API,
    notice: str = "1",
    finish: str = "stop",
    metadata: dict[str, str] | None = None,
) -> pb.Event:
    body = pb.Completion(
        completion_id=completion_id,
        prompt=pb.Prompt(text=prompt),
        outputs=[pb.Output(index=i, text=t, finish_reason=finish) for i, t in enumerate(texts)],
        release_id="r0001-test",
        source=source,
        notice_version=notice,
        metadata=metadata or {},
    )
    return STAMPER.event(user_id, body, id=None if n is None else number(n), at=at)


def ranking(
    user_id: str,
    completion_id: str,
    groups: Iterable[Iterable[int]] = ((0,), (1,)),
    *,
    n: int | None = None,
    at: float | None = None,
    source: pb.Source = pb.SOURCE_API,
    notice: str = "1",
) -> pb.Event:
    body = pb.Ranking(
        completion_id=completion_id,
        groups=[pb.RankGroup(outputs=list(g)) for g in groups],
        source=source,
        notice_version=notice,
    )
    return STAMPER.event(user_id, body, id=None if n is None else number(n), at=at)


def demonstration(
    user_id: str,
    prompt: str,
    response: str,
    *,
    n: int | None = None,
    at: float | None = None,
    source: pb.Source = pb.SOURCE_LABELER,
    notice: str = "1",
) -> pb.Event:
    body = pb.Demonstration(
        prompt=pb.Prompt(text=prompt), response=response, source=source, notice_version=notice
    )
    return STAMPER.event(user_id, body, id=None if n is None else number(n), at=at)
