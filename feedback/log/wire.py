"""An event's bytes, and what is wrong with bytes that are none. The same in every log."""

from google.protobuf.message import DecodeError

from contracts.errors import InstructloopError, InvalidEvent, InvalidInput
from contracts.events import TOPICS, topic_of, validate
from contracts.v1 import events_pb2 as pb

# A prompt and sixteen answers of the largest request that serving takes fit several times.
MAX_BYTES = 8 << 20


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
        validate(event)
    except DecodeError:
        raise Poison("not an Event in protobuf's wire format") from None
    except InvalidEvent as e:  # without what came: it may be what a person said
        raise Poison(f"{e.field}: expected {e.expected}") from None
    if topic_of(event) != topic:
        raise Poison(f"an event of the topic {topic_of(event)}")
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
