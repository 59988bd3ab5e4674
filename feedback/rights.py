"""What people may ask for: to withdraw, to be erased, to know what their data was used for."""

import datetime as dt
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from google.protobuf import json_format

from contracts.errors import InvalidInput
from contracts.events import TOPICS, Stamper
from contracts.log import Erasing, EventSink, EventSource, follow
from contracts.release import ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.consent import PURPOSES, ConsentLedger, ConsentState, ConsentStates
from feedback.dataset.lineage import erase_texts, served_by, uses_of_person
from feedback.dataset.segment import Outlines

_STAMPER = Stamper("feedback")


class Rights:
    """The rights of one person over `sink`, `source` and, where there is one, the registry."""

    def __init__(
        self,
        sink: EventSink,
        source: EventSource,
        registry: ReleaseRegistry | None,
        stamper: Stamper = _STAMPER,
        consent: ConsentStates | None = None,
    ) -> None:
        self._sink, self._source, self._registry = sink, source, registry
        self._stamper, self._consent = stamper, consent or ConsentLedger(source)

    def state(self, user_id: str) -> ConsentState:
        """Where the person stands, counting every event before the question. Raises
        LogUnavailable where that cannot be known now.
        """
        return self._consent.state(user_id)

    def grant(self, user_id: str, notice_version: str, purposes: Iterable[str] = ()) -> None:
        """The person agrees to a notice, for these purposes; for all where none is named."""
        self._append(user_id, pb.CONSENT_STATE_GRANTED, notice_version, purposes)

    def withdraw(
        self, user_id: str, purposes: Iterable[str] = (), *, erase: bool = False
    ) -> dict[str, Any]:
        """Nothing of the person is in the next dataset; with `erase` nobody can read their texts
        again, in the log or in a dataset. Returns `report`.

        The withdrawal is durable before anything is deleted; repeated, it finishes what was cut
        off. Raises InvalidInput.
        """
        if erase and tuple(purposes):
            raise InvalidInput("erase", "all purposes, as erased texts serve none", list(purposes))
        if erase and not isinstance(self._sink, Erasing):
            raise InvalidInput("erase", "a log with texts under keys", type(self._sink).__name__)
        state = pb.CONSENT_STATE_WITHDRAWN
        self._append(user_id, state, notice.CURRENT.version, purposes, erased=erase)
        if erase and isinstance(self._sink, Erasing):
            self._sink.erase(user_id)
            if self._registry is not None:
                erase_texts(self._registry, user_id)
                Outlines.below(self._registry).forget(user_id)
        return self.report(user_id)

    def report(self, user_id: str) -> dict[str, Any]:
        """Every dataset, reward model and release that used the person's data, with row counts."""
        uses = [] if self._registry is None else uses_of_person(self._registry, user_id)
        return {
            "object": "data_use",
            "user_id": user_id,
            "purposes": self.state(user_id).purposes,
            "datasets": [asdict(use) for use in uses],
            "served": None if self._registry is None else served_by(self._registry, uses),
        }

    def export(self, user_id: str) -> dict[str, Any]:
        """All that the log holds about the person and what used it, as JSON values."""
        events = {
            topic: [
                json_format.MessageToDict(record.event)
                for record in follow(self._source, topic, {})
                if record.event.user_id == user_id
            ]
            for topic in TOPICS
        }
        return {
            "object": "export",
            "user_id": user_id,
            "exported": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "events": events,
            "use": self.report(user_id),
        }

    def _append(
        self,
        user_id: str,
        state: pb.ConsentState,
        notice_version: str,
        purposes: Iterable[str],
        *,
        erased: bool = False,
    ) -> None:
        purposes = list(purposes)
        if unknown := [name for name in purposes if name not in PURPOSES]:
            raise InvalidInput("purposes", "some of " + ", ".join(PURPOSES), unknown)
        change = pb.Consent(
            state=state,
            notice_version=notice_version,
            purposes=[PURPOSES[name] for name in purposes],
            erased=erased,
        )
        self._sink.append([self._stamper.event(user_id, change)])
