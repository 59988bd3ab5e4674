"""Build and validate events; ids and time are passed in."""

import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from google.protobuf.message import Message

from contracts.errors import InvalidEvent
from contracts.v1 import events_pb2 as pb

SCHEMA_VERSION = 1

Body = (
    pb.Completion
    | pb.Ranking
    | pb.Demonstration
    | pb.Consent
    | pb.ReleaseChange
    | pb.Rating
    | pb.Edit
    | pb.Comment
    | pb.Withdrawal
)

# One topic per body. The key is the field's name in the envelope's oneof.
TOPIC_OF = {
    "completion": "completions",
    "ranking": "rankings",
    "demonstration": "demonstrations",
    "consent": "consents",
    "release_change": "releases",
    "rating": "ratings",
    "edit": "edits",
    "comment": "comments",
    "withdrawal": "withdrawals",
}
TOPICS = tuple(TOPIC_OF.values())

# Fields of bodies, and of outputs, that are no text of a person's. Every other one is taken for
# text, a new one as well.
READABLE = frozenset(
    "completion_id outputs output sampling release_id release_digest model source notice_version "
    "groups score instruction_version seconds_spent state purposes erased transition reason".split()
)
READABLE_OF_OUTPUT = frozenset({"index", "finish_reason", "release_id", "release_digest"})


def _text_fields(body: str) -> tuple[str, ...]:
    kind = pb.Event.DESCRIPTOR.fields_by_name[body].message_type
    fields = kind.fields if kind is not None else ()
    return tuple(field.name for field in fields if field.name not in READABLE)


_TEXT_FIELDS = {body: _text_fields(body) for body in TOPIC_OF}
_TEXT_FIELDS_OF_OUTPUT = tuple(
    field.name for field in pb.Output.DESCRIPTOR.fields if field.name not in READABLE_OF_OUTPUT
)
# Bodies that hold what people wrote or read.
TEXT_BODIES = tuple(body for body, fields in _TEXT_FIELDS.items() if fields)

# As we write it; others are looked at more slowly.
_is_uuid = re.compile("-".join(f"[0-9a-f]{{{n}}}" for n in (8, 4, 4, 4, 12))).fullmatch
MIN_RANKED, MAX_RANKED = 2, 9
# InstructGPT, table 3: overall quality on a Likert scale of 1 to 7.
MIN_SCORE, MAX_SCORE = 1, 7


def uuid7(unix_seconds: float, entropy: bytes) -> str:
    """UUID version 7 (RFC 9562, section 5.7): 48 bits of milliseconds, then 74 of `entropy`."""
    millis = int(unix_seconds * 1000)
    value = (millis << 80) | int.from_bytes(entropy[:10], "big")
    value = (value & ~(0xF << 76)) | (7 << 76)
    value = (value & ~(0b11 << 62)) | (0b10 << 62)
    digits = f"{value:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# Ids have to differ and need not be secret: asking the kernel for each costs more than the rest of
# an event. A process that is forked goes on with its own.
_RANDOM = random.Random(os.urandom(32))
os.register_at_fork(after_in_child=lambda: _RANDOM.seed(os.urandom(32)))


@dataclass(frozen=True)
class Stamper:
    """Puts bodies into envelopes on behalf of one producer."""

    producer: str
    clock: Callable[[], float] = time.time
    entropy: Callable[[int], bytes] = _RANDOM.randbytes

    def new_id(self) -> str:
        return uuid7(self.clock(), self.entropy(10))

    def event(
        self, user_id: str, body: Body, *, id: str | None = None, at: float | None = None
    ) -> pb.Event:
        """An envelope around `body`, validated.

        `id` is given by a producer that must be idempotent (an importer derives it from the row);
        `at` is the time of what happened, in seconds since 1970, now by default. Raises
        InvalidEvent.
        """
        event = pb.Event(
            id=self.new_id() if id is None else id,
            schema_version=SCHEMA_VERSION,
            producer=self.producer,
            user_id=user_id,
        )
        event.time.FromNanoseconds(int((self.clock() if at is None else at) * 1e9))
        getattr(event, _FIELD_OF[type(body)]).CopyFrom(body)
        validate(event)
        return event


_FIELD_OF: dict[type, str] = {
    pb.Completion: "completion",
    pb.Ranking: "ranking",
    pb.Demonstration: "demonstration",
    pb.Consent: "consent",
    pb.ReleaseChange: "release_change",
    pb.Rating: "rating",
    pb.Edit: "edit",
    pb.Comment: "comment",
    pb.Withdrawal: "withdrawal",
}


def topic_of(event: pb.Event) -> str:
    """The topic that the event belongs to. Raises InvalidEvent when it has no body."""
    return TOPIC_OF[_body_of(event)]


def _body_of(event: pb.Event) -> str:
    field: str | None = event.WhichOneof("body")
    if field is None:
        raise InvalidEvent("body", "one of " + ", ".join(TOPIC_OF), "nothing")
    return field


def validate(event: pb.Event) -> str:
    """The topic that the event belongs to. Raises InvalidEvent unless it may enter the log."""
    if not _is_uuid(event.id):
        try:
            uuid.UUID(event.id)
        except ValueError:
            raise InvalidEvent("id", "a UUID", event.id) from None
    if event.schema_version != SCHEMA_VERSION:
        raise InvalidEvent("schema_version", str(SCHEMA_VERSION), event.schema_version)
    if not event.producer:
        raise InvalidEvent("producer", "a non-empty string", "")
    if not event.user_id:
        raise InvalidEvent("user_id", "a non-empty string", "")
    if not event.HasField("time"):
        raise InvalidEvent("time", "a timestamp", "nothing")
    body = _body_of(event)
    if not event.HasField("sealed"):
        _VALIDATE_BODY[body](getattr(event, body))
    elif body not in TEXT_BODIES:
        raise InvalidEvent("sealed", "nothing, as the body has no text", TOPIC_OF[body])
    return TOPIC_OF[body]


def without_text(event: pb.Event) -> pb.Event:
    """A copy of the event in which nothing is left that a person wrote or read."""
    bare = pb.Event()
    bare.CopyFrom(event)
    if (name := event.WhichOneof("body")) is not None:
        _clear(getattr(bare, name), _TEXT_FIELDS[name])
    for output in bare.completion.outputs if name == "completion" else ():
        _clear(output, _TEXT_FIELDS_OF_OUTPUT)
    bare.sealed.ClearField("text")
    return bare


def _clear(message: Message, fields: tuple[str, ...]) -> None:
    for field in fields:
        message.ClearField(field)


def ranks_of(ranking: pb.Ranking) -> dict[int, int]:
    """Output index to rank, 0 best; tied outputs share a rank."""
    return {output: rank for rank, group in enumerate(ranking.groups) for output in group.outputs}


def prompt_text(prompt: pb.Prompt) -> str:
    """The words of a prompt, whichever form it has; for rules and display, not for the model."""
    return prompt.text or "\n".join(message.content for message in prompt.messages)


def _validate_prompt(prompt: pb.Prompt) -> None:
    text, messages = prompt.text, prompt.messages
    if not messages:
        if not text:
            raise InvalidEvent("prompt", "either text or messages", "neither")
        return
    if text:
        raise InvalidEvent("prompt", "either text or messages", "both")
    for i in range(len(messages)):
        if (role := messages[i].role) not in ("system", "user", "assistant"):
            raise InvalidEvent(f"prompt.messages[{i}].role", "system, user or assistant", role)


def _validate_source(source: int, notice_version: str) -> None:
    if source == pb.SOURCE_UNSPECIFIED:
        raise InvalidEvent("source", "playground, api, labeler or import", "unspecified")
    if not notice_version:
        raise InvalidEvent("notice_version", "the notice that the person agreed to", "")


def _validate_completion(body: pb.Completion) -> None:
    if not body.completion_id:
        raise InvalidEvent("completion_id", "a non-empty string", "")
    _validate_prompt(body.prompt)
    _validate_source(body.source, body.notice_version)
    outputs = body.outputs
    if not outputs:
        raise InvalidEvent("outputs", "at least one output", "none")
    for i in range(len(outputs)):  # an iterator would cost more than the one item that is common
        if outputs[i].index != i:
            raise InvalidEvent(
                "outputs[].index", "0, 1, 2, ... in order", [o.index for o in outputs]
            )
    if body.source != pb.SOURCE_IMPORT and not body.release_id:
        raise InvalidEvent("release_id", "the release that made the outputs", "")


def _validate_ranking(body: pb.Ranking) -> None:
    if not body.completion_id:
        raise InvalidEvent("completion_id", "a non-empty string", "")
    _validate_source(body.source, body.notice_version)
    check_groups([list(group.outputs) for group in body.groups])
    if body.HasField("seconds_spent") and not (
        math.isfinite(body.seconds_spent) and body.seconds_spent >= 0
    ):
        raise InvalidEvent("seconds_spent", "a finite number >= 0", body.seconds_spent)


def check_groups(groups: Iterable[Iterable[int]]) -> None:
    """Raise InvalidEvent unless `groups` order 2..9 outputs, each named once, no group empty."""
    groups = [list(group) for group in groups]
    if any(not group for group in groups):
        raise InvalidEvent("groups", "no empty group", groups)
    ranked = [output for group in groups for output in group]
    if not MIN_RANKED <= len(ranked) <= MAX_RANKED:
        raise InvalidEvent("groups", f"{MIN_RANKED} to {MAX_RANKED} ranked outputs", len(ranked))
    if len(set(ranked)) != len(ranked):
        raise InvalidEvent("groups", "each output at most once", groups)


def _validate_demonstration(body: pb.Demonstration) -> None:
    _validate_prompt(body.prompt)
    _validate_source(body.source, body.notice_version)
    if not body.response:
        raise InvalidEvent("response", "a non-empty string", "")


def _validate_consent(body: pb.Consent) -> None:
    if body.state == pb.CONSENT_STATE_UNSPECIFIED:
        raise InvalidEvent("state", "granted or withdrawn", "unspecified")
    if not body.notice_version:
        raise InvalidEvent("notice_version", "the notice that was shown", "")


def _validate_release_change(body: pb.ReleaseChange) -> None:
    if not body.release_id:
        raise InvalidEvent("release_id", "a non-empty string", "")
    if body.transition == pb.RELEASE_TRANSITION_UNSPECIFIED:
        raise InvalidEvent(
            "transition", "published, swapped in, rolled back or refused", "unspecified"
        )


def _validate_rating(body: pb.Rating) -> None:
    _validate_about(body)
    if not MIN_SCORE <= body.score <= MAX_SCORE:
        raise InvalidEvent("score", f"an integer from {MIN_SCORE} to {MAX_SCORE}", body.score)


def _validate_said(body: pb.Edit | pb.Comment) -> None:
    _validate_about(body)
    if not body.text.strip():
        raise InvalidEvent("text", "a text", "nothing")


def _validate_about(body: pb.Rating | pb.Edit | pb.Comment) -> None:
    if not body.completion_id:
        raise InvalidEvent("completion_id", "a non-empty string", "")
    _validate_source(body.source, body.notice_version)


def _validate_withdrawal(body: pb.Withdrawal) -> None:
    if not body.completion_id:
        raise InvalidEvent("completion_id", "a non-empty string", "")


_VALIDATE_BODY: dict[str, Callable[..., None]] = {
    "completion": _validate_completion,
    "ranking": _validate_ranking,
    "demonstration": _validate_demonstration,
    "consent": _validate_consent,
    "release_change": _validate_release_change,
    "rating": _validate_rating,
    "edit": _validate_said,
    "comment": _validate_said,
    "withdrawal": _validate_withdrawal,
}
