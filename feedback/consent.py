"""Folds consent events into what may be used for which purpose, withdrawals included."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from contracts.access import ConsentReader
from contracts.log import EventSource, Local, Record, follow
from contracts.v1 import events_pb2 as pb

# Name, as settings and requests say it, to purpose. Data is kept for the first two; the third says
# who may see it.
PURPOSES: Mapping[str, "pb.Purpose"] = {
    "training": pb.PURPOSE_TRAINING,
    "evaluation": pb.PURPOSE_EVALUATION,
    "reading": pb.PURPOSE_READING,
}


@dataclass(frozen=True)
class Standing:
    """Where one person stands on one purpose."""

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


@dataclass(frozen=True)
class ConsentState:
    """Where one person stands on every purpose. The fields are the names in PURPOSES."""

    training: Standing = Standing()
    evaluation: Standing = Standing()
    reading: Standing = Standing()

    @classmethod
    def on_all(cls, standing: Standing) -> "ConsentState":
        return cls(standing, standing, standing)

    @property
    def granted(self) -> str | None:
        """The notice under which what comes may be kept: for training, else for evaluation."""
        return self.training.granted or self.evaluation.granted

    def has(self, notice_version: str, purposes: Iterable[str]) -> bool:
        """Whether all of these are granted under this very notice."""
        return all(getattr(self, name).granted == notice_version for name in purposes)

    @property
    def purposes(self) -> list[str]:
        """What is granted now."""
        return [name for name in PURPOSES if getattr(self, name).granted is not None]


UNKNOWN = ConsentState()


def after(state: ConsentState, event: pb.Event) -> ConsentState:
    """The state after one more consent event of the same person."""
    consent = event.consent
    said = [n for n, p in PURPOSES.items() if not consent.purposes or p in consent.purposes]
    at = event.time.ToNanoseconds() / 1e9
    changed = {name: _after(getattr(state, name), consent, at) for name in said}
    return replace(state, **changed)


def fold(records: Iterable[Record]) -> Mapping[str, ConsentState]:
    """User id to state, from the records of the `consents` topic in log order."""
    states: dict[str, ConsentState] = {}
    _fold_into(states, records)
    return states


class ConsentStates(ConsentReader, Protocol):
    """A contracts.access.ConsentReader that knows every purpose."""

    def state(self, user_id: str) -> ConsentState:
        """Where the person stands now. Raises LogUnavailable."""
        ...


class ConsentLedger:
    """contracts.access.ConsentReader over a log: counts every event written before the question."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._local = source if isinstance(source, Local) else None
        self._states: dict[str, ConsentState] = {}
        self._positions: dict[int, int] = {}
        self._lock = threading.Lock()

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        return (self.state(user_id) if wait else self._state_now(user_id)).granted

    def state(self, user_id: str) -> ConsentState:
        with self._lock:
            _fold_into(self._states, follow(self._source, "consents", self._positions))
            return self._states.get(user_id, UNKNOWN)

    def _state_now(self, user_id: str) -> ConsentState:
        """The state where no event came since the last one that was counted."""
        if self._local is None or not self._lock.acquire(blocking=False):
            raise BlockingIOError
        try:
            ends = self._local.ends_now("consents")
            if any(self._positions.get(partition, 0) < end for partition, end in ends.items()):
                raise BlockingIOError
            return self._states.get(user_id, UNKNOWN)
        finally:
            self._lock.release()


def _after(standing: Standing, consent: pb.Consent, at: float) -> Standing:
    if consent.state == pb.CONSENT_STATE_GRANTED:
        return replace(standing, granted=consent.notice_version)
    return Standing(None, at)


def _fold_into(states: dict[str, ConsentState], records: Iterable[Record]) -> None:
    for record in records:
        user_id = record.event.user_id
        states[user_id] = after(states.get(user_id, UNKNOWN), record.event)
