"""What a person agreed to while the log is away, and whether there is room to keep more."""

from concurrent.futures import ThreadPoolExecutor

from contracts.access import ConsentReader
from contracts.errors import LogUnavailable
from contracts.v1 import events_pb2 as pb
from feedback.log.spool import Spool, SpoolFull

# An answer waits for the log at most this long before it goes by what was known last.
_BOUND_S = 0.5


class LastKnownConsent:
    """contracts.access.ConsentReader over another: what that says or, while the log does not
    answer, what it said last about this person and what the person has said here since.

    Of somebody whom nobody asked about before the outage nothing is kept.
    """

    def __init__(self, consent: ConsentReader, spool: Spool) -> None:
        self._consent, self._spool = consent, spool
        self._known: dict[str, str | None] = {}
        self._asking = ThreadPoolExecutor(1, "consent")

    def granted_notice(self, user_id: str) -> str | None:
        try:
            asked = self._asking.submit(self._consent.granted_notice, user_id)
            self._known[user_id] = asked.result(_BOUND_S)
        except (LogUnavailable, TimeoutError):
            if (said := self._spool.latest("consents", user_id)) is not None:
                granted = said.consent.state == pb.CONSENT_STATE_GRANTED
                self._known[user_id] = said.consent.notice_version if granted else None
        return self._known.get(user_id)


class ConsentWhileRoom:
    """contracts.access.ConsentReader for what is about to be recorded: nothing is kept while the
    spool is full. With `refuse` it raises SpoolFull in place of that.
    """

    def __init__(self, consent: ConsentReader, spool: Spool, refuse: bool) -> None:
        self._consent, self._spool, self._refuse = consent, spool, refuse

    def granted_notice(self, user_id: str) -> str | None:
        notice = self._consent.granted_notice(user_id)
        if notice is None or self._spool.has_room():
            return notice
        if self._refuse:
            raise SpoolFull("what people agreed to share cannot be kept at the moment; try again")
        return None
