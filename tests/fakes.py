"""In-memory twins of the interfaces, for tests."""

from collections.abc import Sequence

from contracts.access import Principal
from contracts.errors import AccessDenied
from contracts.events import validate
from contracts.v1 import events_pb2 as pb


class MemorySink:
    """An EventSink that keeps what it got."""

    def __init__(self) -> None:
        self.events: list[pb.Event] = []

    def append(self, events: Sequence[pb.Event]) -> None:
        for event in events:
            validate(event)
        known = {event.id for event in self.events}
        self.events.extend(event for event in events if event.id not in known)

    def completions(self) -> list[pb.Event]:
        return [event for event in self.events if event.HasField("completion")]

    def release_changes(self) -> list[pb.ReleaseChange]:
        return [event.release_change for event in self.events if event.HasField("release_change")]


class FixedConsent:
    """A ConsentReader over a dict of user id to notice version."""

    def __init__(self, granted: dict[str, str]) -> None:
        self.granted = granted

    def granted_notice(self, user_id: str) -> str | None:
        return self.granted.get(user_id)


def authenticate(authorization: str | None) -> Principal:
    """The key il-NAME belongs to NAME; il-prod-NAME is a production key of NAME."""
    name = (authorization or "").removeprefix("Bearer il-")
    if not name or name == authorization:
        raise AccessDenied("no API key")
    production = name.startswith("prod-")
    return Principal(name.removeprefix("prod-"), f"key-{name}", production)
