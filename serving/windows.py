"""Windows: what each key used in the last minute, counted in this process.

Twins of the strategies of `limits` by which Redis counts. Its storage in memory starts a thread for
nearly every request, to forget what is old; here who comes forgets it. For one thread at a time.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from limits import RateLimitItem
from limits.util import WindowStats

WINDOW_S = 60

Key = tuple[str, ...]


class MovingWindow:
    """Counts one by one: what was used in the 60 seconds before now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # When each key was used; whose last use is longest ago comes first.
        self._uses: OrderedDict[Key, deque[float]] = OrderedDict()

    def hit(self, item: RateLimitItem, *key: str, cost: int = 1) -> bool:
        """Whether there was room for `cost` more, which are counted then."""
        now = self._clock()
        uses = self._recent(key, now)
        if len(uses) + cost > item.amount:
            return False
        uses.extend([now] * cost)
        return True

    def get_window_stats(self, item: RateLimitItem, *key: str) -> WindowStats:
        now = self._clock()
        uses = self._recent(key, now)
        return WindowStats((uses[0] if uses else now) + WINDOW_S, item.amount - len(uses))

    def _recent(self, key: Key, now: float) -> deque[float]:
        since = now - WINDOW_S
        while self._uses and _ended(next(iter(self._uses.values())), since):
            self._uses.popitem(last=False)
        uses = self._uses.setdefault(key, deque())
        self._uses.move_to_end(key)
        while uses and uses[0] < since:
            uses.popleft()
        return uses


def _ended(uses: deque[float], since: float) -> bool:
    return not uses or uses[-1] < since


@dataclass(slots=True)
class _Counts:
    """Of a minute of the clock, and of the one before."""

    minute: int
    before: int = 0
    now: int = 0

    def move_to(self, minute: int) -> None:
        if minute != self.minute:
            self.before = self.now if minute == self.minute + 1 else 0
            self.minute, self.now = minute, 0


class SlidingCounter:
    """Counts by two numbers: this minute's, and the last one's, which fades while this one runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Whose last use is longest ago comes first.
        self._counts: OrderedDict[Key, _Counts] = OrderedDict()

    def hit(self, item: RateLimitItem, *key: str, cost: int = 1) -> bool:
        """Whether there was room for `cost` more, which are counted then."""
        counts, left_s = self._recent(key)
        if _used(counts, left_s) + cost > item.amount:
            return False
        counts.now += cost
        return True

    def get_window_stats(self, item: RateLimitItem, *key: str) -> WindowStats:
        """The reset is when the next token comes free, or a new minute begins."""
        counts, left_s = self._recent(key)
        next_s = left_s if counts.now else 0.0
        if counts.before:
            faded_s = left_s % (WINDOW_S / counts.before)
            next_s = min(faded_s, left_s) if counts.now else faded_s
        return WindowStats(self._clock() + next_s, max(0, item.amount - _used(counts, left_s)))

    def _recent(self, key: Key) -> tuple[_Counts, float]:
        """The counts, and the seconds that are left of this minute."""
        minute, gone_s = divmod(self._clock(), WINDOW_S)
        while self._counts and next(iter(self._counts.values())).minute < minute - 1:
            self._counts.popitem(last=False)
        counts = self._counts.setdefault(key, _Counts(int(minute)))
        self._counts.move_to_end(key)
        counts.move_to(int(minute))
        return counts, WINDOW_S - gone_s


def _used(counts: _Counts, left_s: float) -> int:
    return math.floor(counts.before * left_s / WINDOW_S) + counts.now
