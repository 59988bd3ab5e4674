import uuid
from collections.abc import Callable

import pytest

from contracts.errors import InvalidEvent
from contracts.events import Stamper, prompt_text, ranks_of, topic_of, uuid7, validate
from contracts.v1 import events_pb2 as pb

STAMPER = Stamper("test", clock=lambda: 1_645_557_742.0, entropy=lambda n: bytes(range(n)))


def completion() -> pb.Completion:
    return pb.Completion(
        completion_id="cmpl-1",
        prompt=pb.Prompt(text="Hi"),
        outputs=[pb.Output(index=0, text="a"), pb.Output(index=1, text="b")],
        release_id="r0001-test",
        source=pb.SOURCE_API,
        notice_version="1",
    )


def ranking(*groups: list[int]) -> pb.Ranking:
    return pb.Ranking(
        completion_id="cmpl-1",
        groups=[pb.RankGroup(outputs=group) for group in groups],
        source=pb.SOURCE_API,
        notice_version="1",
    )


def demonstration() -> pb.Demonstration:
    return pb.Demonstration(
        prompt=pb.Prompt(text="Hi"), response="Ho", source=pb.SOURCE_LABELER, notice_version="1"
    )


def test_uuid7_is_the_example_of_the_standard() -> None:
    # RFC 9562, appendix A.6: 2022-02-22T19:22:22Z, rand_a CC3, rand_b 18C4DC0C0C07398F.
    rand_a, rand_b = 0xCC3, 0x18C4DC0C0C07398F
    # The version takes the top 4 of the 80 bits, the variant 2 more at bit 62.
    entropy = ((rand_a << 64) | rand_b).to_bytes(10, "big")
    assert uuid7(1_645_557_742.0, entropy) == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


def test_uuid7_sorts_by_time_whatever_the_entropy() -> None:
    early, late = uuid7(1.0, b"\xff" * 10), uuid7(1.5, b"\x00" * 10)
    assert early < late
    assert uuid.UUID(early).version == uuid.UUID(late).version == 7


def test_a_stamped_event_says_who_when_and_what() -> None:
    event = STAMPER.event("ann", completion())
    assert event.id == "017f22e2-79b0-7001-8203-040506070809"
    assert (event.schema_version, event.producer, event.user_id) == (1, "test", "ann")
    assert event.time.ToJsonString() == "2022-02-22T19:22:22Z"
    assert topic_of(event) == "completions"


def test_id_and_time_can_be_given() -> None:
    given = "00000000-0000-7000-8000-000000000001"
    event = STAMPER.event("ann", demonstration(), id=given, at=0.0)
    assert (event.id, event.time.ToNanoseconds(), event.HasField("time")) == (given, 0, True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda e: setattr(e, "id", "1"), "id"),
        (lambda e: setattr(e, "schema_version", 2), "schema_version"),
        (lambda e: setattr(e, "producer", ""), "producer"),
        (lambda e: setattr(e, "user_id", ""), "user_id"),
        (lambda e: e.ClearField("time"), "time"),
        (lambda e: e.ClearField("completion"), "body"),
        (lambda e: setattr(e.completion, "completion_id", ""), "completion_id"),
        (lambda e: e.completion.ClearField("prompt"), "prompt"),
        (lambda e: e.completion.prompt.messages.add(role="user", content="x"), "prompt"),
        (lambda e: setattr(e.completion, "source", 0), "source"),
        (lambda e: setattr(e.completion, "notice_version", ""), "notice_version"),
        (lambda e: e.completion.ClearField("outputs"), "outputs"),
        (lambda e: setattr(e.completion.outputs[1], "index", 2), "outputs[].index"),
        (lambda e: setattr(e.completion, "release_id", ""), "release_id"),
    ],
)
def test_an_invalid_completion_names_the_field(
    change: Callable[[pb.Event], object], field: str
) -> None:
    event = STAMPER.event("ann", completion())
    change(event)
    with pytest.raises(InvalidEvent) as error:
        validate(event)
    assert error.value.field == field


def test_an_imported_completion_needs_no_release() -> None:
    body = completion()
    body.source, body.release_id = pb.SOURCE_IMPORT, ""
    STAMPER.event("ann", body)


def test_an_unknown_role_is_refused() -> None:
    body = demonstration()
    body.prompt.CopyFrom(pb.Prompt(messages=[pb.Message(role="tool", content="x")]))
    with pytest.raises(InvalidEvent, match=r"messages\[0\].role"):
        STAMPER.event("ann", body)


@pytest.mark.parametrize("groups", [([0], [1]), ([0, 1],), ([8, 7, 6], [5, 4], [3, 2, 1, 0])])
def test_rankings_of_two_to_nine_outputs(groups: tuple[list[int], ...]) -> None:
    STAMPER.event("ann", ranking(*groups))


@pytest.mark.parametrize(
    "groups", [(), ([0],), ([0], [], [1]), ([0], [0]), ([0, 0],), (list(range(10)),)]
)
def test_other_rankings_are_refused(groups: tuple[list[int], ...]) -> None:
    with pytest.raises(InvalidEvent, match="groups"):
        STAMPER.event("ann", ranking(*groups))


@pytest.mark.parametrize("seconds", [-0.5, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    body = ranking([0], [1])
    body.seconds_spent = seconds
    with pytest.raises(InvalidEvent, match="seconds_spent"):
        STAMPER.event("ann", body)


def test_tied_outputs_share_a_rank() -> None:
    assert ranks_of(ranking([2], [0, 3], [1])) == {2: 0, 0: 1, 3: 1, 1: 2}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            pb.Demonstration(prompt=pb.Prompt(text="Hi"), source=pb.SOURCE_API, notice_version="1"),
            "response",
        ),
        (pb.Consent(notice_version="1"), "state"),
        (pb.Consent(state=pb.CONSENT_STATE_GRANTED), "notice_version"),
        (pb.ReleaseChange(transition=pb.RELEASE_TRANSITION_PUBLISHED), "release_id"),
        (pb.ReleaseChange(release_id="r1"), "transition"),
    ],
)
def test_other_bodies_say_what_is_missing(
    body: pb.Demonstration | pb.Consent | pb.ReleaseChange, field: str
) -> None:
    with pytest.raises(InvalidEvent) as error:
        STAMPER.event("ann", body)
    assert error.value.field == field


def test_the_words_of_a_prompt() -> None:
    messages = [
        pb.Message(role="system", content="Be brief."),
        pb.Message(role="user", content="Hi"),
    ]
    assert prompt_text(pb.Prompt(text="Hi")) == "Hi"
    assert prompt_text(pb.Prompt(messages=messages)) == "Be brief.\nHi"
