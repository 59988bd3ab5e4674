import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from limits import RateLimitItem
from redis import Redis
from redis.exceptions import RedisError

from contracts.access import Principal
from contracts.errors import InvalidInput, LimitReached
from serving.limits import AWAY_S, Limiter, LimitOptions, duration
from serving.windows import MovingWindow
from tests.conftest import free_port

ANN, BOB = Principal("ann", "key-a"), Principal("bob", "key-b")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is missing")
        pytest.skip("redis-server is not installed")
    port, folder = free_port(), tmp_path_factory.mktemp("redis")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    with Redis(port=port) as client:
        while True:
            try:
                client.ping()
                break
            except RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(10)


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    return f"{request.getfixturevalue('redis_url')}"


def test_a_key_is_stopped_at_its_limit_and_no_other(storage: str) -> None:
    limiter = Limiter(LimitOptions(2, 0, storage), f"requests-{storage[:5]}")
    assert limiter.take_request(ANN)["x-ratelimit-remaining-requests"] == "1"
    limiter.take_request(ANN)
    with pytest.raises(LimitReached) as caught:
        limiter.take_request(ANN)
    assert caught.value.kind == "requests" and 1 <= caught.value.retry_after_s <= 60
    limiter.take_request(BOB)
    limiter.take_request(Principal("ann", "key-c", requests_per_minute=0))


def test_tokens_are_taken_in_advance_and_settled(storage: str) -> None:
    limiter = Limiter(LimitOptions(0, 100, storage), f"tokens-{storage[:5]}")
    assert limiter.take_tokens(ANN, 40)["x-ratelimit-remaining-tokens"] == "60"
    limiter.settle(ANN, 40, 70)
    assert limiter.take_tokens(ANN, 20)["x-ratelimit-remaining-tokens"] == "10"
    with pytest.raises(LimitReached, match="100 tokens"):
        limiter.take_tokens(ANN, 11)
    limiter.settle(ANN, 20, 500)  # takes what is left
    with pytest.raises(LimitReached):
        limiter.take_tokens(ANN, 1)
    with pytest.raises(InvalidInput, match="at most 100 tokens"):
        limiter.take_tokens(BOB, 101)


def test_redis_counts_for_all_replicas_together(redis_url: str) -> None:
    replicas = [Limiter(LimitOptions(10, 0, redis_url), "replicas") for _ in range(3)]
    taken = 0
    for i in range(30):
        try:
            replicas[i % 3].take_request(ANN)
        except LimitReached:
            continue
        taken += 1
    assert taken == 10


def test_an_outage_of_the_counter_is_none_of_the_service() -> None:
    limiter = Limiter(LimitOptions(1, 1, f"redis://127.0.0.1:{free_port()}/0"), "gone")
    for _ in range(2):
        assert limiter.take_request(ANN) == {}
    assert limiter.unlimited == 2


def test_storage_that_cannot_be_read_is_named_without_its_password() -> None:
    with pytest.raises(InvalidInput, match=r"^INSTRUCTLOOP_LIMIT_STORAGE: ") as caught:
        Limiter(LimitOptions(storage="redis://:secret@h:port/0"), "wrong")
    assert "secret" not in str(caught.value)


def test_a_counter_that_does_not_answer_is_not_asked_by_every_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, now = silent.getsockname()[1], [0.0]
        limiter = Limiter(
            LimitOptions(9, 9, f"redis://127.0.0.1:{port}/0"), "hung", clock=lambda: now[0]
        )
        for _ in range(5):
            assert limiter.take_request(ANN) == limiter.take_tokens(ANN, 1) == {}
        limiter.settle(ANN, 1, 2)
        assert limiter.unlimited == 10
        assert accepted(silent) == 1
        now[0] += AWAY_S
        limiter.take_request(ANN)
        assert accepted(silent) == 1


def accepted(server: socket.socket) -> int:
    """How many connections came since the last time."""
    server.setblocking(False)
    found = 0
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            found += 1
    return found


def test_requests_do_not_wait_for_each_other_at_a_counter_elsewhere() -> None:
    """As they would for a lock that is held while the counter is asked."""

    class Meeting(MovingWindow):
        both = threading.Barrier(2)

        def hit(self, item: RateLimitItem, *key: str, cost: int = 1) -> bool:
            self.both.wait(10)
            return True

    limiter = Limiter(LimitOptions(9, 0, f"redis://127.0.0.1:{free_port()}/0"), "met")
    limiter._requests = Meeting(time.time)
    with ThreadPoolExecutor(2) as askers:
        said = list(askers.map(limiter.take_request, (ANN, BOB)))
    assert all(said)


def test_counts_in_memory_do_not_go_by_a_clock_that_may_be_set() -> None:
    assert Limiter(LimitOptions(1), "set")._clock is time.monotonic


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.02, "20ms"), (1, "1s"), (59.2, "1m0s"), (63, "1m3s"), (6, "6s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, written: str) -> None:
    assert duration(seconds) == written
