"""Limiter: requests and tokens a minute for each key, counted in memory or in Redis."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import ParamSpec, Protocol, TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.util import WindowStats

from contracts.access import Principal
from contracts.errors import InvalidInput, LimitReached
from serving.windows import MovingWindow, SlidingCounter

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# A text's tokens before anyone has counted them: OpenAI's rule of thumb, 4 characters each.
CHARACTERS_PER_TOKEN = 4
# How long a limit's storage may hold up a request, in seconds.
STORAGE_BOUND_S = 0.25
# And for how long nobody asks it again after it did.
AWAY_S = 1.0


@dataclass(frozen=True)
class LimitOptions:
    """What a key without limits of its own may use a minute, 0 for no limit; and where use is
    counted: `memory://` in this process, `redis://host:port/n` for all replicas together.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    storage: str = "memory://"


class Counter(Protocol):
    """What both counters, and the strategies of `limits`, do for a limit and the parts of a key."""

    def hit(self, item: RateLimitItem, *key: str, cost: int = 1) -> bool: ...

    def get_window_stats(self, item: RateLimitItem, *key: str) -> WindowStats: ...


class Limiter:
    """Counts what each key uses. Safe to call from several threads; blocks where Redis is asked.

    Requests are counted one by one over the last 60 seconds. Tokens are too many for that: their
    window is two counters, the older of which fades out. Tokens are taken when a request comes, as
    many as it may cost, so that no crowd of requests at once exceeds the limit; what it costs
    beyond that is taken at its end. Where the storage does not answer, requests pass and are
    counted in `unlimited`: an outage of the counter is no outage of the service.
    """

    def __init__(
        self, options: LimitOptions, name: str, clock: Callable[[], float] | None = None
    ) -> None:
        self._options, self._name = options, name
        self._remote = options.storage.startswith("redis")
        # In memory a clock that is set back would hold keys at their limits until it has caught up.
        self._clock = clock = clock or (time.time if self._remote else time.monotonic)
        self._requests, self._tokens = (
            _in_redis(options.storage)
            if self._remote
            else (MovingWindow(clock), SlidingCounter(clock))
        )
        # Counters in memory are not safe for several threads at once.
        self._alone: AbstractContextManager[object] = (
            nullcontext() if self._remote else threading.Lock()
        )
        self._away_until = -math.inf
        # Requests that were let through because the storage did not answer.
        self.unlimited = 0

    async def aside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call of one of these methods from an event loop: on a thread where it may block."""
        if self._remote:
            return await asyncio.to_thread(call, *args, **kwargs)
        return call(*args, **kwargs)

    def take_request(self, who: Principal) -> dict[str, str]:
        """Count one request; the headers that say what is left. Raises LimitReached."""
        limit = _own(who.requests_per_minute, self._options.requests_per_minute)
        return self._take(self._requests, "requests", limit, who, 1)

    def take_tokens(self, who: Principal, tokens: int) -> dict[str, str]:
        """Count what a request may cost. Raises LimitReached, or InvalidInput if no minute has that
        much.
        """
        limit = _own(who.tokens_per_minute, self._options.tokens_per_minute)
        if limit and tokens > limit:
            expected = f"a request of at most {limit} tokens with its answers, by this key's limit"
            raise InvalidInput("max_tokens", expected, tokens)
        return self._take(self._tokens, "tokens", limit, who, tokens)

    def settle(self, who: Principal, taken: int, used: int) -> None:
        """Count what a request cost beyond what was taken for it."""
        limit = _own(who.tokens_per_minute, self._options.tokens_per_minute)
        if not limit or used <= taken or self._clock() < self._away_until:
            return
        item, key = _per_minute(limit), (self._name, "tokens", who.key_id)
        try:
            with self._alone:
                left = self._tokens.get_window_stats(item, *key).remaining
                self._tokens.hit(item, *key, cost=max(0, min(used - taken, left)))
        except StorageError as e:
            self._let_through(e)

    def _take(
        self, counter: Counter, kind: str, limit: int, who: Principal, cost: int
    ) -> dict[str, str]:
        if not limit:
            return {}
        if self._clock() < self._away_until:
            self.unlimited += 1
            return {}
        item, key = _per_minute(limit), (self._name, kind, who.key_id)
        try:
            with self._alone:
                taken = counter.hit(item, *key, cost=cost)
                left = counter.get_window_stats(item, *key)
        except StorageError as e:
            self._let_through(e)
            return {}
        reset_s = max(0.0, left.reset_time - self._clock())
        said = {
            f"x-ratelimit-limit-{kind}": str(limit),
            f"x-ratelimit-remaining-{kind}": str(max(0, left.remaining)),
            f"x-ratelimit-reset-{kind}": duration(reset_s),
        }
        if not taken:
            raise LimitReached(kind, limit, max(1, math.ceil(reset_s)), said)
        return said

    def _let_through(self, error: Exception) -> None:
        self.unlimited += 1
        self._away_until = self._clock() + AWAY_S
        log.warning("limits are not counted: %s", type(error).__name__)


def _in_redis(storage: str) -> tuple[Counter, Counter]:
    bounds = {"socket_timeout": STORAGE_BOUND_S, "socket_connect_timeout": STORAGE_BOUND_S}
    try:
        redis = storage_from_string(storage, wrap_exceptions=True, **bounds)
    except ValueError:  # the URL, which may hold a password, is not repeated
        got = "an address that cannot be read"
        raise InvalidInput("INSTRUCTLOOP_LIMIT_STORAGE", "redis://host:port/0", got) from None
    return MovingWindowRateLimiter(redis), SlidingWindowCounterRateLimiter(redis)


_per_minute = lru_cache(RateLimitItemPerMinute)


def estimated_tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 6s, 1m3s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _own(of_key: int | None, of_server: int) -> int:
    return of_server if of_key is None else of_key
