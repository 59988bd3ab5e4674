import threading

from limits import RateLimitItemPerMinute

from contracts.access import Principal
from serving.limits import Limiter, LimitOptions
from serving.windows import MovingWindow, SlidingCounter


class Clock:
    """Seconds that pass when a test says so; a minute of the clock begins at 0."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_moving_window_frees_each_use_a_minute_later() -> None:
    clock, limit = Clock(), RateLimitItemPerMinute(2)
    window = MovingWindow(clock)
    assert window.hit(limit, "a")
    clock.now = 30
    assert window.hit(limit, "a")
    clock.now = 59
    assert not window.hit(limit, "a")
    assert window.get_window_stats(limit, "a") == (60, 0)
    assert window.hit(limit, "b")
    clock.now = 61  # the first use is gone, and what was refused never counted
    assert window.get_window_stats(limit, "a") == (90, 1)
    assert window.hit(limit, "a")
    assert not window.hit(limit, "a")


def test_a_sliding_counter_fades_the_minute_before() -> None:
    clock, limit = Clock(), RateLimitItemPerMinute(100)
    counter = SlidingCounter(clock)
    assert counter.get_window_stats(limit, "a") == (0, 100)
    clock.now = 10
    assert counter.hit(limit, "a", cost=80)
    assert not counter.hit(limit, "a", cost=21)
    assert counter.get_window_stats(limit, "a") == (60, 20)
    clock.now = 75  # three quarters of the 80 count: 60; one comes free every 0.75 s
    assert not counter.hit(limit, "a", cost=41)
    assert counter.get_window_stats(limit, "a") == (75, 40)
    assert counter.hit(limit, "a", cost=40)
    clock.now = 180  # the 40 were in the minute before the last
    assert counter.get_window_stats(limit, "a").remaining == 100


def test_a_key_that_is_not_used_is_forgotten() -> None:
    clock, limit = Clock(), RateLimitItemPerMinute(10)
    window, counter = MovingWindow(clock), SlidingCounter(clock)
    for key in ("a", "b"):
        assert window.hit(limit, key) and counter.hit(limit, key)
    clock.now = 130
    assert window.hit(limit, "c") and counter.hit(limit, "c")
    assert list(window._uses) == list(counter._counts) == [("c",)]


def test_counting_in_memory_starts_no_thread() -> None:
    before, limiter = threading.active_count(), Limiter(LimitOptions(9, 9), "threads")
    limiter.take_request(Principal("ann", "key-a"))
    limiter.take_tokens(Principal("ann", "key-a"), 1)
    assert threading.active_count() == before
