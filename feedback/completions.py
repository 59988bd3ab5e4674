"""Completions: what was recorded of each person, folded from the log, without what was taken back.

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
    """Where a completion stands in the log, and how many outputs it has."""

    owner: str
    partition: int
    offset: int
    outputs: int


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
        return self._place(user_id, completion_id).outputs

    def get(self, user_id: str, completion_id: str) -> pb.Event:
        """The person's completion. Raises NotFound."""
        return self._read(self._place(user_id, completion_id))

    def of(self, user_id: str, *, newest_first: bool) -> Iterator[pb.Event]:
        """The person's completions in the order of the log."""
        with self._lock:
            self._follow_completions()
            self._follow_withdrawals()
            ids = [i for i in self._ids[user_id] if (user_id, i) not in self._withdrawn]
            places = [self._places[i] for i in ids]
        for place in reversed(places) if newest_first else places:
            yield self._read(place)

    def _place(self, user_id: str, completion_id: str) -> _Place:
        with self._lock:
            if completion_id not in self._places:
                self._follow_completions()
            self._follow_withdrawals()
            place = self._places.get(completion_id)
            if (
                place is None
                or place.owner != user_id
                or (user_id, completion_id) in self._withdrawn
            ):
                raise NotFound(
                    f"no completion {completion_id!r} of yours is kept; only answers that came "
                    "with x-instructloop-recorded: true are",
                    "completion_id",
                )
            return place

    def _read(self, place: _Place) -> pb.Event:
        (record,) = self._source.read("completions", place.partition, place.offset, 1)
        return record.event

    def _follow_completions(self) -> None:
        for record in follow(self._source, "completions", self._positions["completions"]):
            body, owner = record.event.completion, record.event.user_id
            if body.completion_id not in self._places:
                place = _Place(owner, record.partition, record.offset, len(body.outputs))
                self._places[body.completion_id] = place
                self._ids[owner].append(body.completion_id)

    def _follow_withdrawals(self) -> None:
        for record in follow(self._source, "withdrawals", self._positions["withdrawals"]):
            event = record.event
            self._withdrawn.add((event.user_id, event.withdrawal.completion_id))
