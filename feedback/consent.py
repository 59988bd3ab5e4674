"""Folds consent events into what may be used, withdrawals included."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from contracts.log import EventSource, Record, follow
from contracts.v1 import events_pb2 as pb


@dataclass(frozen=True)
class ConsentState:
    """Where one person stands."""

    # The notice that is agreed to now; None where nothing is.
    granted: str | None = None
    # When the person last withdrew, in seconds since 1970.
    # What was given until then stays out for good.
    withdrawn_at: float | None = None

    def allows(self, given_at: float) -> bool:
        """Whether the person agrees, and did not withdraw after `given_at`."""
        return self.granted is not None and not self.took_back(given_at)

    def took_back(self, given_at: float) -> bool:
        """Whether the person withdrew what was given at `given_at`, or all that comes."""
        if self.withdrawn_at is None:
            return False
        return self.granted is None or given_at <= self.withdrawn_at


UNKNOWN = ConsentState()


def after(state: ConsentState, event: pb.Event) -> ConsentState:
    """The state after one more consent event of the same person."""
    if event.consent.state == pb.CONSENT_STATE_GRANTED:
        return ConsentState(event.consent.notice_version, state.withdrawn_at)
    return ConsentState(None, event.time.ToNanoseconds() / 1e9)


def fold(records: Iterable[Record]) -> Mapping[str, ConsentState]:
    """User id to state, from the records of the `consents` topic in log order."""
    states: dict[str, ConsentState] = {}
    _fold_into(states, records)
    return states


class ConsentLedger:
    """contracts.access.ConsentReader over a log: counts every event written before the question."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._states: dict[str, ConsentState] = {}
        self._positions: dict[int, int] = {}
        self._lock = threading.Lock()

    def granted_notice(self, user_id: str) -> str | None:
        with self._lock:
            _fold_into(self._states, follow(self._source, "consents", self._positions))
            return self._states.get(user_id, UNKNOWN).granted


def _fold_into(states: dict[str, ConsentState], records: Iterable[Record]) -> None:
    for record in records:
        user_id = record.event.user_id
        states[user_id] = after(states.get(user_id, UNKNOWN), record.event)
