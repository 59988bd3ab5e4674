"""An event's bytes, and what is wrong with bytes that are none. The same in every log."""

import uuid

from google.protobuf.message import DecodeError

from contracts.errors import InstructloopError, InvalidEvent, InvalidInput
from contracts.events import SCHEMA_VERSION, TOPIC_OF, TOPICS, validate
from contracts.v1 import events_pb2 as pb

# A prompt and sixteen answers of the largest request that serving takes fit several times.
MAX_BYTES = 8 << 20
# Namespace of the ids of what stands in for consents that cannot be read.
_UNREADABLE = uuid.UUID("5f0c3f0e-7a58-5c57-9d5b-3f7d5d0b8a11")


class Poison(InstructloopError):
    """A record is not an event of its topic; says why, without what is in it."""


def encode(event: pb.Event) -> bytes:
    """The bytes of a valid event. Raises InvalidEvent."""
    validate(event)
    value = event.SerializeToString(deterministic=True)
    if len(value) > MAX_BYTES:
        raise InvalidEvent("event", f"at most {MAX_BYTES} bytes", len(value))
    return value


def decode(topic: str, value: bytes | None) -> pb.Event:
    """The event that `value` holds. Raises Poison."""
    try:
        event = pb.Event.FromString(value or b"")
        found = validate(event)
    except DecodeError:
        raise Poison("not an Event in protobuf's wire format") from None
    except InvalidEvent as e:  # without what came: it may be what a person said
        raise Poison(f"{e.field}: expected {e.expected}") from None
    if found != topic:
        raise Poison(f"an event of the topic {found}")
    return event


def withdrawal_for(topic: str, place: tuple[int, int], user: str, at: float) -> pb.Event | None:
    """What counts while the record at (partition, offset) cannot be read, written for `user` at
    `at`, in seconds since 1970: of a consent, a withdrawal of everything; of others, nothing.
    """
    if topic != TOPIC_OF["consent"] or not user:
        return None
    withdrawn = pb.Consent(state=pb.CONSENT_STATE_WITHDRAWN, notice_version="unreadable")
    event = pb.Event(
        id=str(uuid.uuid5(_UNREADABLE, f"{topic}/{place[0]}/{place[1]}")),
        schema_version=SCHEMA_VERSION,
        producer="log",
        user_id=user,
        consent=withdrawn,
    )
    event.time.FromNanoseconds(int(at * 1e9))
    return event


def check_topic(topic: str) -> None:
    """Raises InvalidInput for a topic that no event belongs to."""
    if topic not in TOPICS:
        raise InvalidInput("topic", "one of " + ", ".join(TOPICS), topic)


def check_numbers(**numbers: int) -> None:
    """Raises InvalidInput for a negative one."""
    for name, number in numbers.items():
        if number < 0:
            raise InvalidInput(name, "a number >= 0", number)
