"""What a person agreed to while the log is away, and whether there is room to keep more."""

from concurrent.futures import ThreadPoolExecutor
from functools import reduce

from contracts.access import ConsentReader
from contracts.errors import LogUnavailable
from feedback.consent import UNKNOWN, ConsentState, ConsentStates, after
from feedback.log.spool import Spool, SpoolFull

# An answer waits for the log at most this long before it goes by what was known last.
_BOUND_S = 0.5


class LastKnownConsent:
    """feedback.consent.ConsentStates over another: what that says or, while the log does not
    answer, what it said last about this person and what the person has said here since.

    Of somebody whom nobody asked about before the outage nothing is kept.
    """

    def __init__(self, consent: ConsentStates, spool: Spool) -> None:
        self._consent, self._spool = consent, spool
        self._known: dict[str, ConsentState] = {}
        self._asking = ThreadPoolExecutor(1, "consent")

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        if not wait:  # the log is on other machines
            raise BlockingIOError
        try:
            return self.state(user_id).granted
        except LogUnavailable:
            return None

    def state(self, user_id: str) -> ConsentState:
        """Raises LogUnavailable where nothing is known of the person."""
        # Before the log is asked: what goes there meanwhile waits no longer, and counts.
        said = self._spool.said_by(user_id, "consents")
        asked = self._asking.submit(self._consent.state, user_id)
        try:
            self._known[user_id] = asked.result(_BOUND_S)
        except (LogUnavailable, TimeoutError):
            asked.cancel()  # or it would be asked before who comes once the log is back
            if not said and user_id not in self._known:
                raise LogUnavailable("what the person agreed to is in a log that is away") from None
            # Once more what the log has by now changes nothing: the last word on a purpose counts.
            self._known[user_id] = reduce(after, said, self._known.get(user_id, UNKNOWN))
        return self._known[user_id]


class ConsentWhileRoom:
    """contracts.access.ConsentReader for what is about to be recorded: nothing is kept while the
    spool is full. With `refuse` it raises SpoolFull in place of that.
    """

    def __init__(self, consent: ConsentReader, spool: Spool, refuse: bool) -> None:
        self._consent, self._spool, self._refuse = consent, spool, refuse

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        if not wait:  # for the spool, too
            raise BlockingIOError
        notice = self._consent.granted_notice(user_id)
        if notice is None or self._spool.has_room():
            return notice
        if self._refuse:
            raise SpoolFull("what people agreed to share cannot be kept at the moment; try again")
        return None
