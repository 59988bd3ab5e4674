"""Completions: what was recorded of each person, folded from the log, without what was taken back
or erased.

Another person's completion looks like one that does not exist.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from contracts.errors import NotFound
from contracts.log import EventSource, follow
from contracts.v1 import events_pb2 as pb


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a completion stands in the log."""

    owner: str
    partition: int
    offset: int


class Completions:
    """Safe to call from several threads; reads the log, so not on an event loop."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._places: dict[str, _Place] = {}
        self._ids: dict[str, list[str]] = defaultdict(list)
        self._withdrawn: set[tuple[str, str]] = set()
        self._positions: dict[str, dict[int, int]] = {"completions": {}, "withdrawals": {}}
        self._lock = threading.Lock()

    def outputs(self, user_id: str, completion_id: str) -> int:
        """How many outputs the person's completion has. Raises NotFound."""
        return len(self.get(user_id, completion_id).completion.outputs)

    def get(self, user_id: str, completion_id: str) -> pb.Event:
        """The person's completion. Raises NotFound."""
        place = self._place(user_id, completion_id)
        event = self._read(place) if place is not None else None
        if event is None:
            raise NotFound(
                f"no completion {completion_id!r} of yours is kept; only answers that came "
                "with x-instructloop-recorded: true are",
                "completion_id",
            )
        return event

    def of(self, user_id: str, *, newest_first: bool) -> Iterator[pb.Event]:
        """The person's completions in the order of the log."""
        with self._lock:
            self._follow_completions()
            self._follow_withdrawals()
            ids = [i for i in self._ids[user_id] if (user_id, i) not in self._withdrawn]
            places = [self._places[i] for i in ids]
        for place in reversed(places) if newest_first else places:
            if (event := self._read(place)) is not None:
                yield event

    def _place(self, user_id: str, completion_id: str) -> _Place | None:
        """Of the person's completion; None where there is none, or it was taken back."""
        with self._lock:
            if completion_id not in self._places:
                self._follow_completions()
            self._follow_withdrawals()
            place = self._places.get(completion_id)
            if place is None or place.owner != user_id:
                return None
            return None if (user_id, completion_id) in self._withdrawn else place

    def _read(self, place: _Place) -> pb.Event | None:
        """None where its person erased it since: the log then gives what comes after it."""
        records = self._source.read("completions", place.partition, place.offset, 1)
        found = [record.event for record in records if record.offset == place.offset]
        return found[0] if found else None

    def _follow_completions(self) -> None:
        for record in follow(self._source, "completions", self._positions["completions"]):
            body, owner = record.event.completion, record.event.user_id
            if body.completion_id not in self._places:
                place = _Place(owner, record.partition, record.offset)
                self._places[body.completion_id] = place
                self._ids[owner].append(body.completion_id)

    def _follow_withdrawals(self) -> None:
        for record in follow(self._source, "withdrawals", self._positions["withdrawals"]):
            event = record.event
            self._withdrawn.add((event.user_id, event.withdrawal.completion_id))
