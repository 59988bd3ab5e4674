"""Simulated people: what they send, what they must not send, what they notice."""

import asyncio
from dataclasses import replace

import pytest

from demo.people import (
    TEMPERATURE,
    Exchange,
    Person,
    Record,
    everyone_takes_part,
    keep_asking,
    population,
    take_part,
)
from demo.tasks import from_prompt
from tests.demo.fake_service import NOTICE, FakeService, running

ANNA = Person("user-001", "il-1", opted_in=True, source="api", error_rate=0.1, seed=3)


def issue_key(user_id: str, production: bool) -> str:
    return f"il-{user_id}{'-production' if production else ''}"


def visit(service: FakeService, person: Person, prompts: int = 4) -> Record:
    async def go() -> Record:
        async with running(service) as url:
            return await take_part(person, url, prompts)

    return asyncio.run(go())


def ask_for(service: FakeService, person: Person, exchanges: int) -> list[Exchange]:
    """Keep asking until the service has seen `exchanges` requests."""

    async def go() -> list[Exchange]:
        until = asyncio.Event()
        async with running(service) as url:
            asking = asyncio.create_task(keep_asking(person, url, until))
            while len(service.requests) < exchanges:
                await asyncio.sleep(0.01)
            until.set()
            return await asking

    return asyncio.run(go())


def test_a_population_has_every_kind_of_person() -> None:
    people = population(1, 60, issue_key)
    assert [p.user_id for p in people[:2]] == ["user-000", "user-001"]
    assert sum(p.source == "playground" for p in people) == 30
    assert sum(not p.opted_in for p in people) == 10
    assert [p.key.endswith("-production") for p in people] == [p.production for p in people]
    assert sum(p.production for p in people) == sum(p.withdraws for p in people) == 1
    marked = [p for p in people if p.marker]
    assert len({p.marker for p in marked}) == len(marked) == 12
    assert all(p.withdraws or p.production or not p.opted_in for p in marked)
    assert population(1, 60, issue_key) == people != population(2, 60, issue_key)


def test_who_opts_in_is_recorded_and_ranks() -> None:
    service = FakeService()
    record = visit(service, ANNA)
    assert service.consents == [("il-1", True)]
    assert [e.endpoint for e in record.exchanges] == ["completions", "chat"] * 2
    assert all(e.recorded and not e.failure and e.seconds > 0 for e in record.exchanges)
    assert record.releases == {"r0001-aaaa"}
    assert record.refusals == []
    assert all(
        4 <= body["n"] <= 6 and body["temperature"] == TEMPERATURE for body in service.requests
    )
    assert len({body["seed"] for body in service.requests}) == 4
    assert len(set(service.idempotency_keys)) == len(service.rankings) == 4
    for asked, ranking, judged in zip(
        service.requests, service.rankings, record.judgements, strict=True
    ):
        assert sorted(i for group in ranking["groups"] for i in group) == list(range(asked["n"]))
        assert ranking["groups"] == judged.groups
        assert len(judged.scores) == asked["n"]
        task = from_prompt(judged.prompt)
        assert task is not None
        assert asked["metadata"] == ranking["metadata"] == {"use_case": task.use_case}


def test_a_prompt_ends_its_line_and_a_chat_message_does_not() -> None:
    service = FakeService()
    record = visit(service, ANNA, prompts=2)
    prompts = [judged.prompt for judged in record.judgements]
    assert service.prompts == [("il-1", prompts[0] + "\n"), ("il-1", prompts[1])]


def test_playground_people_say_which_notice_they_saw() -> None:
    service = FakeService()
    visit(service, replace(ANNA, source="playground"), prompts=2)
    assert {h["x-instructloop-source"] for h in service.headers} == {"playground"}
    assert {h["x-instructloop-notice"] for h in service.headers} == {NOTICE}
    api = FakeService()
    visit(api, ANNA, prompts=2)
    assert all("x-instructloop-source" not in h for h in api.headers)


@pytest.mark.parametrize(
    "person",
    [replace(ANNA, opted_in=False), replace(ANNA, production=True, key="il-production")],
    ids=["not opted in", "production"],
)
def test_who_is_not_recorded_asks_with_a_marker_and_ranks_nothing(person: Person) -> None:
    service = FakeService()
    record = visit(service, person)
    assert bool(service.consents) == person.opted_in
    assert all(prompt.startswith(f"{person.marker} ") for _, prompt in service.prompts)
    assert not any(e.recorded for e in record.exchanges)
    assert not service.rankings
    assert not record.judgements


def test_who_withdraws_does_so_after_the_last_ranking() -> None:
    service, person = FakeService(), replace(ANNA, withdraws=True)
    record = visit(service, person)
    assert service.consents == [("il-1", True), ("il-1", False)]
    assert len(service.rankings) == 4
    assert person.marker and all(prompt.startswith(person.marker) for _, prompt in service.prompts)
    assert all(from_prompt(judged.prompt) for judged in record.judgements)


def test_failures_are_counted_and_do_not_stop_a_person() -> None:
    record = visit(FakeService(fail_every=2), ANNA)
    assert [e.failure for e in record.exchanges] == ["", "InternalServerError 500"] * 2
    assert not any(e.unstamped for e in record.exchanges)
    assert len(record.judgements) == 2


def test_everyone_gets_a_record_in_order() -> None:
    people = population(1, 8, issue_key)

    async def go() -> list[Record]:
        async with running(FakeService()) as url:
            return await everyone_takes_part(people, url, 2, concurrency=3)

    records = asyncio.run(go())
    assert [r.person for r in records] == people
    assert all(len(r.exchanges) == 2 for r in records)


def test_asking_on_streams_every_second_answer_of_each_endpoint() -> None:
    exchanges = ask_for(FakeService(), ANNA, 8)
    assert [(e.endpoint, e.streamed) for e in exchanges[:4]] == [
        ("completions", False),
        ("completions", True),
        ("chat", False),
        ("chat", True),
    ]
    assert all(e.release == "r0001-aaaa" and not e.failure for e in exchanges)
    assert [e.started for e in exchanges] == sorted(e.started for e in exchanges)


def test_a_stream_of_two_releases_is_unstamped() -> None:
    exchanges = ask_for(FakeService(last_chunk="r0002-bbbb"), ANNA, 4)
    assert [e.unstamped for e in exchanges[:4]] == [False, True, False, True]
