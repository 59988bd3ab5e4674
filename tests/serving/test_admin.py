import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from contracts.events import Stamper
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.rollout import Replica
from serving.app import create_app
from serving.settings import Settings
from tests import tiny_models
from tests.fakes import FakeEngine, FixedConsent, MemorySink, authenticate

CHANGES = ("swap", "pin", "unpin", "rollback", "drain", "undrain")
NOW = 1_800_000_000.0


class House:
    """The app on a fake engine, on the second of two releases."""

    def __init__(self, root: Path) -> None:
        self.registry, self.engine = ReleaseRegistry(root / "registry"), FakeEngine()
        for number in (1, 2):
            folder = tiny_models.save(root / f"model{number}", number, tied=False)
            self.registry.publish(
                Release(
                    id=f"r{number}",
                    model="tiny",
                    created=dt.datetime(2026, 1, number, tzinfo=dt.UTC),
                    artifact=self.registry.artifacts.put("policy", folder),
                    canary=Canary(token_ids=(1, 2), logprobs=(0.0,)),
                    parent="r1" if number == 2 else None,
                    code_version="test",
                )
            )
        self.app = create_app(
            # Longer than any test: what follows, follows because it was told.
            Settings(release_poll_s=60, drain_bound_s=0.2, replica="a"),
            self.engine,
            MemorySink(),
            self.registry,
            authenticate,
            FixedConsent({}),
            Stamper("serving", clock=lambda: NOW),
            on_engine_failure=lambda: None,
        )

    @asynccontextmanager
    async def opened(self, user: str = "root") -> AsyncIterator[httpx.AsyncClient]:
        async with self.app.router.lifespan_context(self.app):
            client = httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app),
                base_url="http://test",
                headers={"authorization": f"Bearer il-{user}"},
            )
            async with client, asyncio.timeout(20):
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
                yield client


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_only_an_operator_comes_in(house: House) -> None:
    async def scene() -> None:
        async with house.opened("ann") as client:
            for path in CHANGES:
                answer = await client.post(f"/v1/admin/{path}", json={"release": "r1"})
                assert answer.status_code in (401, 403)
            for path in ("status", "releases"):
                assert (await client.get(f"/v1/admin/{path}")).status_code in (401, 403)
            assert (await client.get("/readyz")).json()["release"] == "r2"

    asyncio.run(scene())


def test_swap_pin_unpin_and_rollback_are_done_when_they_are_answered(house: House) -> None:
    async def scene() -> None:
        async with house.opened() as client:

            async def told(path: str, **body: str) -> tuple[str, str | None]:
                said = (await client.post(f"/v1/admin/{path}", json=body)).json()
                assert (await client.get("/readyz")).json()["release"] == said["serving"]
                return said["serving"], said["pinned"]

            assert await told("swap", release="r1") == ("r1", None)
            assert await told("pin") == ("r1", "r1")
            house.registry.publish(house.registry.get("r2"))
            refused = await client.post("/v1/admin/swap", json={"release": "r2"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "release")
            assert await told("pin", release="r2") == ("r2", "r2")
            assert await told("rollback") == ("r1", "r1")
            assert await told("unpin") == ("r2", None)
            assert await told("rollback") == ("r1", None)
            said = (await client.get("/v1/admin/releases")).json()
            assert [release["id"] for release in said["data"]] == ["r1", "r2"]
            assert [(turn["release"], turn["why"]) for turn in said["history"]] == [
                ("r1", "published"),
                ("r2", "published"),
                ("r1", "swapped to"),
                ("r2", "pinned"),
                ("r1", "rolled back"),
                ("r2", "unpinned"),
                ("r1", "rolled back"),
            ]
            assert house.engine.stagings == 1

    asyncio.run(scene())


def test_unknown_release_and_one_without_parent_are_not_found(house: House) -> None:
    async def scene() -> None:
        async with house.opened() as client:
            for path in ("swap", "pin"):
                answer = await client.post(f"/v1/admin/{path}", json={"release": "r9"})
                assert answer.status_code == 404
            await client.post("/v1/admin/swap", json={"release": "r1"})
            answer = await client.post("/v1/admin/rollback")
            assert answer.status_code == 404 and "no parent" in answer.text

    asyncio.run(scene())


def test_swap_that_is_refused_says_why(house: House) -> None:
    async def scene() -> None:
        async with house.opened() as client:
            house.engine.staging_error = "out of memory"
            answer = await client.post("/v1/admin/swap", json={"release": "r1"})
            assert answer.status_code == 409 and "out of memory" in answer.text
            said = (await client.get("/v1/admin/status")).json()
            assert (said["serving"], said["target"]) == ("r2", "r1")
            assert said["reason"] == said["last_change"]["reason"] == "out of memory"
            assert said["counts"] == {"swapped_in": 1, "refused": 1}
            house.engine.staging_error = None
            again = await client.post("/v1/admin/swap", json={"release": "r1"})
            assert again.json()["serving"] == "r1"

    asyncio.run(scene())


def test_drained_replica_is_not_ready_and_answers_what_still_comes(house: House) -> None:
    async def scene() -> None:
        async with house.opened() as client:
            ask = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            assert (await client.post("/v1/admin/drain")).json()["draining"]
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.post("/v1/completions", json=ask)).status_code == 200
            assert not (await client.post("/v1/admin/undrain")).json()["draining"]
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(scene())


def test_status_shows_every_replica_and_a_server_that_ends_is_gone(house: House) -> None:
    at = dt.datetime.fromtimestamp(NOW, dt.UTC)
    other = Replica(
        name="b",
        at=at - dt.timedelta(seconds=60),
        state="swapping",
        draining=False,
        running=3,
        serving="r1",
        target="r2",
    )

    async def scene() -> None:
        house.registry.rollout.report(other)
        async with house.opened() as client:
            await asyncio.sleep(0.5)
            assert [r.name for r in house.registry.rollout.replicas(at)] == ["a", "b"]
            said = {r["name"]: r for r in (await client.get("/v1/admin/status")).json()["replicas"]}
            assert (said["a"]["serving"], said["a"]["lost"]) == ("r2", False)
            assert (said["b"]["serving"], said["b"]["lost"]) == ("r1", True)
        assert [r.name for r in house.registry.rollout.replicas(at)] == ["b"]
        assert house.registry.rollout.replicas(at + dt.timedelta(days=2)) == []

    asyncio.run(scene())


async def ask_streamed(house: House, read: asyncio.Event, sent: list[bytes]) -> None:
    """A client that reads nothing more after the response's head until `read` is set."""
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 5, "stream": true}'
    headers = [(b"authorization", b"Bearer il-ann"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope |= {"query_string": b"", "headers": headers, "raw_path": b"/v1/completions"}
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        await read.wait()

    await house.app(scope, receive, send)


def test_client_that_does_not_read_holds_up_no_swap_and_gets_all_of_its_answer(
    house: House,
) -> None:
    async def scene() -> None:
        async with house.opened() as client:
            read, sent = asyncio.Event(), list[bytes]()
            asking = asyncio.create_task(ask_streamed(house, read, sent))
            while not sent:
                await asyncio.sleep(0.01)
            said = (await client.post("/v1/admin/rollback")).json()
            assert said["serving"] == "r1" and said["last_change"]["cut_short"] == 0
            read.set()
            await asking
            events = b"".join(sent).split(b"\n\n")
            chunks = [event for event in events if event.startswith(b"data: {")]
            assert len(chunks) == 5 and all(b'"system_fingerprint":"r2"' in c for c in chunks)
            assert b"error" not in b"".join(sent)

    asyncio.run(scene())


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_answer_that_outlasts_the_drain_bound_is_ended_with_a_reason(
    house: House, streams: bool
) -> None:
    async def scene() -> None:
        async with house.opened() as client:
            ask = {"model": "tiny", "prompt": "a", "max_tokens": 60_000 if streams else 3}
            house.engine.context = 60_000
            if not streams:
                house.engine.may_answer.clear()
            asking = asyncio.create_task(
                client.post("/v1/completions", json={**ask, "stream": streams})
            )
            while (await client.get("/v1/admin/status")).json()["running"] == 0:
                await asyncio.sleep(0.01)
            said = (await client.post("/v1/admin/rollback")).json()
            assert said["serving"] == "r1" and said["last_change"]["cut_short"] == 1
            answer = await asking
            assert "changes its weights" in answer.text
            if streams:
                assert answer.status_code == 200 and "system_fingerprint" in answer.text
            else:
                assert answer.status_code == 503 and answer.headers["retry-after"]

    asyncio.run(scene())
