"""Judgement > consent check > ranking event > sink."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from contracts.access import ConsentReader, Principal
from contracts.errors import AccessDenied, InvalidInput, NotFound
from contracts.events import Stamper, check_groups, uuid7
from contracts.log import EventSink, EventSource, follow
from contracts.v1 import events_pb2 as pb


@dataclass(frozen=True)
class Judgement:
    """One person's order over the outputs of one of their completions, best group first."""

    completion_id: str
    groups: tuple[tuple[int, ...], ...]
    instruction_version: str
    seconds_spent: float | None
    metadata: Mapping[str, str]
    source: pb.Source


class Intake:
    """Takes rankings in. Safe to call from several threads; blocks, so not on an event loop."""

    def __init__(
        self,
        sink: EventSink,
        source: EventSource,
        consent: ConsentReader,
        stamper: Stamper,
    ) -> None:
        self._sink, self._consent, self._stamper = sink, consent, stamper
        self._completions = _Completions(source)
        self._rankings = _Rankings(source)

    def rank(self, who: Principal, judgement: Judgement, idempotency_key: str | None) -> str:
        """The id of the ranking event, durable by then; the same key again gives the same id.

        Raises AccessDenied without consent, NotFound for what is not this person's, InvalidInput.
        """
        notice = self._consent.granted_notice(who.user_id)
        if who.production or notice is None:
            raise AccessDenied(
                "rankings are kept only for people who opted in, and never for production keys; "
                "opt in with PUT /v1/consent"
            )
        self._check(who, judgement)
        ranking = _ranking(judgement, notice)
        if idempotency_key is None:
            event = self._stamper.event(who.user_id, ranking)
            self._sink.append([event])
            return event.id
        event = self._stamper.event(who.user_id, ranking, id=_id_of(who.user_id, idempotency_key))
        self._sink.append([event])
        if self._rankings.digest(event.id) != _digest(ranking):
            raise InvalidInput(
                "Idempotency-Key", "a key not used for another ranking", idempotency_key
            )
        return event.id

    def _check(self, who: Principal, judgement: Judgement) -> None:
        owner, outputs = self._completions.owner_and_outputs(judgement.completion_id)
        if owner != who.user_id:
            raise NotFound(
                f"no completion {judgement.completion_id!r} of yours was recorded; "
                "rank the id of an answer that came with x-instructloop-recorded: true"
            )
        check_groups(judgement.groups)
        if (highest := max(max(group) for group in judgement.groups)) >= outputs:
            raise InvalidInput("groups", f"output indices below {outputs}", highest)
        if min(min(group) for group in judgement.groups) < 0:
            raise InvalidInput("groups", "output indices from 0", judgement.groups)


class _Completions:
    """Completion id to owner and number of outputs, folded from the log where an id is new."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._known: dict[str, tuple[str, int]] = {}
        self._positions: dict[int, int] = {}
        self._lock = threading.Lock()

    def owner_and_outputs(self, completion_id: str) -> tuple[str | None, int]:
        with self._lock:
            if completion_id not in self._known:
                for record in follow(self._source, "completions", self._positions):
                    body = record.event.completion
                    entry = record.event.user_id, len(body.outputs)
                    self._known.setdefault(body.completion_id, entry)
            return self._known.get(completion_id, (None, 0))


class _Rankings:
    """Id of a ranking event to a digest of what was said in it."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._known: dict[str, bytes] = {}
        self._positions: dict[int, int] = {}
        self._lock = threading.Lock()

    def digest(self, event_id: str) -> bytes | None:
        """The digest for an id that the log holds; None where its person erased it."""
        with self._lock:
            if event_id not in self._known:
                for record in follow(self._source, "rankings", self._positions):
                    self._known[record.event.id] = _digest(record.event.ranking)
            return self._known.get(event_id)


def _ranking(judgement: Judgement, notice: str) -> pb.Ranking:
    return pb.Ranking(
        completion_id=judgement.completion_id,
        groups=[pb.RankGroup(outputs=group) for group in judgement.groups],
        instruction_version=judgement.instruction_version,
        seconds_spent=judgement.seconds_spent,
        source=judgement.source,
        notice_version=notice,
        metadata=dict(judgement.metadata),
    )


def _digest(ranking: pb.Ranking) -> bytes:
    """Of what the person said; the notice is ours and may be newer when a request is repeated."""
    said = pb.Ranking()
    said.CopyFrom(ranking)
    said.ClearField("notice_version")
    return hashlib.sha256(said.SerializeToString(deterministic=True)).digest()


def _id_of(user_id: str, idempotency_key: str) -> str:
    """An event id that a repeated request gets again; its time is 0, as the clock would differ."""
    said = json.dumps(["ranking", user_id, idempotency_key])
    return uuid7(0.0, hashlib.sha256(said.encode()).digest())
