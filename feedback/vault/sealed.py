"""SealedLog: between producers, consumers and any log; the log only ever holds ciphertext of texts.

What stays readable in the log: ids, times, sources, notices, the outputs' number and how they
ended, rankings' order, release ids. Consents and releases hold no text and pass as they are.
"""

import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from contracts.errors import CorruptEvent, InvalidInput
from contracts.events import TEXT_BODIES, validate, without_text
from contracts.log import DeadLetter, Erasing, Local, Log, Record
from contracts.v1 import events_pb2 as pb
from feedback.log.wire import Poison, decode, encode
from feedback.vault.keys import KeyVault
from feedback.vault.master import KEY_BYTES, NONCE_BYTES


class SealedLog:
    """contracts.log.Log over another one. Records that nobody can read any more are left out.

    `unreadable` counts them, by topic, each time that they are met.
    """

    def __init__(self, log: Log, vault: KeyVault) -> None:
        self.inner, self.vault = log, vault
        self._local = log if isinstance(log, Local) else None
        self.unreadable = Counter[str]()

    def append(self, events: Sequence[pb.Event]) -> None:
        for event in events:
            validate(event)
        self.inner.append(self._sealed(events))

    def partitions(self, topic: str) -> int:
        return self.inner.partitions(topic)

    def ends(self, topic: str) -> dict[int, int]:
        return self.inner.ends(topic)

    def ends_now(self, topic: str) -> dict[int, int]:
        """contracts.log.Local, as far as the log inside is."""
        if self._local is None:
            raise BlockingIOError
        return self._local.ends_now(topic)

    def read(self, topic: str, partition: int, offset: int, limit: int) -> list[Record]:
        while records := self.inner.read(topic, partition, offset, limit):
            if opened := self._open(records):
                return opened
            offset = records[-1].offset + 1
        return []

    def commit(self, group: str, topic: str, partition: int, offset: int) -> None:
        self.inner.commit(group, topic, partition, offset)

    def committed(self, group: str, topic: str, partition: int) -> int:
        return self.inner.committed(group, topic, partition)

    def expire(self, topic: str, before: float) -> int:
        return self.inner.expire(topic, before)

    def dead_letters(self) -> list[DeadLetter]:
        """As they stand in the log: what was written through here is sealed."""
        return self.inner.dead_letters()

    def revive(self, letter: DeadLetter) -> str | None:
        """As in the log; a text that was mended in clear, or comes from elsewhere, is sealed."""
        try:
            event = decode(letter.topic, letter.value)
        except Poison as e:
            return str(e)
        if event.HasField("sealed"):
            return self.inner.revive(letter)
        (sealed,) = self._sealed([event])
        return self.inner.revive(replace(letter, value=encode(sealed)))

    def erasures(self) -> Mapping[str, float]:
        """User id to the time of the last erasure, in seconds since 1970."""
        return self.vault.erased_at()

    def erase(self, user_id: str) -> None:
        """Nobody can read the person's texts again: the key is gone from now on, and where the log
        can, so are the bytes.
        """
        self.vault.erase(user_id)
        if isinstance(self.inner, Erasing):
            self.inner.erase(user_id)

    def close(self) -> None:
        self.inner.close()
        self.vault.close()

    def _sealed(self, events: Sequence[pb.Event]) -> list[pb.Event]:
        if agreeing := _agreeing(events):
            self.vault.readmit(agreeing)
        keys = self.vault.keys_for({e.user_id for e in events if _has_text(e)})
        return [_seal(e, keys) for e in events]

    def _open(self, records: Sequence[Record]) -> list[Record]:
        keys = self.vault.keys_named({r.event.sealed.key_id for r in records} - {""})
        ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        erased = cache(self.vault.erased_at)  # asked at most once, and only where it matters
        opened = [r for r in records if self._opened(r.event, ciphers, erased)]
        if hidden := len(records) - len(opened):
            self.unreadable[records[0].topic] += hidden
        return opened

    def _opened(
        self,
        event: pb.Event,
        ciphers: Mapping[str, AESGCM],
        erased: Callable[[], Mapping[str, float]],
    ) -> bool:
        """Makes the event what it was when it was appended; False where its person erased it."""
        if not event.HasField("sealed"):  # no text, or written before there were keys
            return not _has_text(event) or (
                event.time.ToNanoseconds() / 1e9 > erased().get(event.user_id, -math.inf)
            )
        sealed = event.sealed
        key_id, text = sealed.key_id, sealed.text
        if not text or not key_id:
            return False
        if (cipher := ciphers.get(key_id)) is not None:
            _unseal(event, cipher, key_id, text)
            return True
        if event.user_id in erased():
            return False
        raise InvalidInput(
            "vault",
            f"the one that this log was written with; {self.vault.path} lacks keys",
            event.id,
        )


def _has_text(event: pb.Event) -> bool:
    return event.WhichOneof("body") in TEXT_BODIES


def _agreeing(events: Iterable[pb.Event]) -> set[str]:
    granted = pb.CONSENT_STATE_GRANTED
    return {e.user_id for e in events if e.HasField("consent") and e.consent.state == granted}


def _seal(event: pb.Event, keys: Mapping[str, tuple[str, bytes]]) -> pb.Event:
    """The event with its whole body encrypted and, in clear, only what is no text.

    For who erased everything and did not agree again the key is thrown away at once.
    """
    name = event.WhichOneof("body")
    if name not in TEXT_BODIES:
        return event
    key_id, key = keys.get(event.user_id) or ("", secrets.token_bytes(KEY_BYTES))
    said = getattr(event, name).SerializeToString()
    nonce = secrets.token_bytes(NONCE_BYTES)
    text = nonce + AESGCM(key).encrypt(nonce, said, _context(event, key_id))
    sealed = without_text(event)
    sealed.sealed.key_id, sealed.sealed.text = key_id, text
    return sealed


def _unseal(event: pb.Event, cipher: AESGCM, key_id: str, text: bytes) -> None:
    """In place: a log gives its reader an event of its own."""
    try:
        said = cipher.decrypt(text[:NONCE_BYTES], text[NONCE_BYTES:], _context(event, key_id))
    except InvalidTag:
        raise CorruptEvent(f"event {event.id}: its text fits neither key nor envelope") from None
    event.ClearField("sealed")
    getattr(event, event.WhichOneof("body") or "").ParseFromString(said)


def _context(event: pb.Event, key_id: str) -> bytes:
    return f"{event.id}\0{event.user_id}\0{key_id}".encode()
