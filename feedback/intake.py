"""Judgement > consent check > event > sink."""

import hashlib
import json
import threading
from collections.abc import Iterable

from contracts.access import ConsentReader, Principal
from contracts.errors import AccessDenied, InvalidInput
from contracts.events import TOPIC_OF, Stamper, check_groups, topic_of, uuid7
from contracts.log import EventSink, EventSource, follow
from contracts.v1 import events_pb2 as pb
from feedback.completions import Completions

# What a person says about a completion of theirs; the notice is filled in here.
Judgement = pb.Ranking | pb.Rating | pb.Edit | pb.Comment


class Intake:
    """Takes judgements in. Safe to call from several threads; blocks, so not on an event loop."""

    def __init__(
        self,
        sink: EventSink,
        source: EventSource,
        completions: Completions,
        consent: ConsentReader,
        stamper: Stamper,
    ) -> None:
        self._sink, self._consent, self._stamper = sink, consent, stamper
        self._completions, self._said = completions, _Said(source)

    def take(self, who: Principal, said: Judgement, idempotency_key: str | None) -> str:
        """The id of the event, durable by then; the same key again gives the same id.

        Raises AccessDenied without consent, NotFound for what is not this person's, InvalidInput.
        """
        notice = self._consent.granted_notice(who.user_id)
        if who.production or notice is None:
            raise AccessDenied(
                "feedback is kept only from people who opted in, and never for production keys; "
                "opt in with PUT /v1/consent",
                "consent_required",
            )
        self._check(who, said)
        said.notice_version = notice
        if idempotency_key is None:
            event = self._stamper.event(who.user_id, said)
            self._sink.append([event])
            return event.id
        event = self._stamper.event(who.user_id, said, id=_id_of(who, said, idempotency_key))
        self._sink.append([event])
        if self._said.digest(event) != _digest(event):
            raise InvalidInput(
                "Idempotency-Key", "a key not used for anything else", idempotency_key
            )
        return event.id

    def _check(self, who: Principal, said: Judgement) -> None:
        outputs = self._completions.outputs(who.user_id, said.completion_id)
        if isinstance(said, pb.Ranking):
            check_groups([list(group.outputs) for group in said.groups])
            _check_exist("groups", (i for group in said.groups for i in group.outputs), outputs)
        elif not isinstance(said, pb.Comment) or said.HasField("output"):
            _check_exist("output", [said.output], outputs)


def _check_exist(field: str, indices: Iterable[int], outputs: int) -> None:
    if (highest := max(indices)) >= outputs:
        raise InvalidInput(field, f"output indices below {outputs}", highest)


class _Said:
    """Topic and event id to a digest of what was said in it, folded from the log."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._known: dict[tuple[str, str], bytes] = {}
        self._positions: dict[str, dict[int, int]] = {topic: {} for topic in TOPIC_OF.values()}
        self._lock = threading.Lock()

    def digest(self, event: pb.Event) -> bytes | None:
        """The digest of the logged event of this id; None where its person erased it."""
        topic = topic_of(event)
        with self._lock:
            if (topic, event.id) not in self._known:
                for record in follow(self._source, topic, self._positions[topic]):
                    self._known[topic, record.event.id] = _digest(record.event)
            return self._known.get((topic, event.id))


def _digest(event: pb.Event) -> bytes:
    """Of what the person said; the notice is ours and may be newer when a request is repeated."""
    said = pb.Event()
    said.CopyFrom(event)
    body = getattr(said, said.WhichOneof("body") or "")
    body.ClearField("notice_version")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def _id_of(who: Principal, said: Judgement, idempotency_key: str) -> str:
    """An event id that a repeated request gets again; its time is 0, as the clock would differ."""
    kind = type(said).__name__.lower()
    text = json.dumps([kind, who.user_id, idempotency_key])
    return uuid7(0.0, hashlib.sha256(text.encode()).digest())
