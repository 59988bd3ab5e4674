"""Simulated people: who they are, and what they do with the service, over HTTP only."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import httpx
from openai import AsyncOpenAI

from demo.raters import Groups, rank
from demo.tasks import Task, gold_score, make_task

INSTRUCTION_VERSION = "demo-1"
MAX_TOKENS = 40
# Of what people ask: a little below 1, as who wants a good answer would set it.
TEMPERATURE = 0.85
TIMEOUT_SECONDS = 120.0
# Of a population: who never opts in. One more opts in with a key of production traffic, and one
# opts in
# and withdraws at the end.
NOT_OPTED_IN = 1 / 6
# Each person errs at a rate of their own; ERROR_RATE on average. Two people then agree on a clear
# pair in 0.85^2 + 0.15^2 = 74.5 % of cases; InstructGPT's labelers agreed in 72.6 % (section 3.4).
ERROR_RATE = 0.15
ERROR_SPREAD = 0.04

Clock = Callable[[], float]


@dataclass(frozen=True)
class Person:
    """One simulated user."""

    user_id: str
    key: str
    opted_in: bool
    source: Literal["api", "playground"]
    error_rate: float
    seed: int
    withdraws: bool = False
    production: bool = False

    @property
    def marker(self) -> str:
        """A word before every prompt whose traces must not be found; empty where they may be."""
        keepable = self.opted_in and not self.withdraws and not self.production
        return "" if keepable else f"zq{Random(f'{self.seed}:{self.user_id}').getrandbits(40):010x}"


@dataclass(frozen=True)
class Exchange:
    """One request for answers and what came of it. Times are seconds of the caller's clock."""

    started: float
    seconds: float
    endpoint: Literal["completions", "chat"]
    streamed: bool
    # The release that the header and the body (every chunk of it) agree on; empty where they do
    # not.
    release: str
    recorded: bool
    # What went wrong; empty where nothing did.
    failure: str = ""

    @property
    def unstamped(self) -> bool:
        return not self.failure and not self.release


@dataclass(frozen=True)
class Judgement:
    """A ranking that the service took, with the gold scores of the answers."""

    completion_id: str
    prompt: str
    scores: tuple[float, ...]
    groups: Groups


@dataclass
class Record:
    """What happened to one person."""

    person: Person
    exchanges: list[Exchange] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    # Requests about consent and rankings that the service did not accept, and why.
    refusals: list[str] = field(default_factory=list)

    @property
    def releases(self) -> set[str]:
        return {e.release for e in self.exchanges if e.release}


@dataclass(frozen=True)
class _Answers:
    completion_id: str
    release: str
    recorded: bool
    # Each answer's text, and whether it came to its end.
    outputs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class _Visit:
    """A person's two clients: OpenAI's own for answers, plain HTTP for consent and rankings."""

    person: Person
    openai: AsyncOpenAI
    http: httpx.AsyncClient
    model: str
    clock: Clock


def population(seed: int, size: int, issue_key: Callable[[str, bool], str]) -> list[Person]:
    """People numbered from 0, half of them at the Playground; `issue_key(user_id, production)`."""
    if size < 6:
        raise ValueError(f"size: expected at least 6 people, got {size}")
    rng = Random(f"population:{seed}")
    withdraws, production, *others = rng.sample(range(size), size)
    silent = set(others[: round(size * NOT_OPTED_IN)])
    people = []
    for i in range(size):
        user_id = f"user-{i:03d}"
        people.append(
            Person(
                user_id=user_id,
                key=issue_key(user_id, i == production),
                opted_in=i not in silent,
                source="playground" if i % 2 else "api",
                error_rate=rng.uniform(ERROR_RATE - ERROR_SPREAD, ERROR_RATE + ERROR_SPREAD),
                seed=seed,
                withdraws=i == withdraws,
                production=i == production,
            )
        )
    return people


async def everyone_takes_part(
    people: Sequence[Person],
    base_url: str,
    prompts: int,
    *,
    concurrency: int = 12,
    clock: Clock = time.perf_counter,
) -> list[Record]:
    """`take_part` for all of `people`, `concurrency` of them at a time."""
    places = asyncio.Semaphore(concurrency)

    async def one(person: Person) -> Record:
        async with places:
            return await take_part(person, base_url, prompts, clock=clock)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(person)) for person in people]
    return [task.result() for task in tasks]


async def take_part(
    person: Person, base_url: str, prompts: int, *, clock: Clock = time.perf_counter
) -> Record:
    """Read the notice, answer it, ask `prompts` times, rank what is recorded, withdraw if so
    minded.

    `base_url` is the service's root, without `/v1`.
    """
    record, rng = Record(person), Random(f"people:{person.seed}:{person.user_id}")
    async with _visit(person, base_url, clock) as visit:
        notice = await _read_notice(visit, record.refusals)
        if person.opted_in:
            await _set_consent(visit, record.refusals, True, notice)
        for turn in range(prompts):
            await _ask_and_rank(visit, record, make_task(rng), notice, turn, rng)
        if person.withdraws:
            await _set_consent(visit, record.refusals, False, notice)
    return record


async def keep_asking(
    person: Person, base_url: str, until: asyncio.Event, *, clock: Clock = time.perf_counter
) -> list[Exchange]:
    """Ask for one answer after another, every second one streamed, until the event is set."""
    rng, exchanges = Random(f"asking:{person.seed}:{person.user_id}"), list[Exchange]()
    async with _visit(person, base_url, clock) as visit:
        notice = await _read_notice(visit, [])
        while not until.is_set():
            turn = len(exchanges)
            ask = _ask_streaming if turn % 2 else _ask_once
            exchange, _ = await _timed(visit, turn // 2, ask, make_task(rng), 1, rng, notice)
            exchanges.append(exchange)
    return exchanges


@asynccontextmanager
async def _visit(person: Person, base_url: str, clock: Clock) -> AsyncIterator[_Visit]:
    root = base_url.rstrip("/")
    headers = {"Authorization": f"Bearer {person.key}"}
    async with (
        AsyncOpenAI(
            api_key=person.key, base_url=f"{root}/v1", max_retries=0, timeout=TIMEOUT_SECONDS
        ) as openai,
        httpx.AsyncClient(base_url=root, headers=headers, timeout=TIMEOUT_SECONDS) as http,
    ):
        models = await openai.models.list()
        yield _Visit(person, openai, http, models.data[0].id, clock)


async def _read_notice(visit: _Visit, refusals: list[str]) -> str:
    response = await _send(visit, refusals, "GET", "/v1/consent")
    return str(response.json()["notice"]["version"]) if response else ""


async def _set_consent(visit: _Visit, refusals: list[str], granted: bool, notice: str) -> None:
    body = {"granted": granted, "notice_version": notice}
    await _send(visit, refusals, "PUT", "/v1/consent", json=body)


async def _send(
    visit: _Visit, refusals: list[str], method: str, path: str, **content: Any
) -> httpx.Response | None:
    """The response; None, with a note in `refusals`, where the service did not accept."""
    try:
        response = await visit.http.request(method, path, **content)
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        refusals.append(f"{method} {path}: {error.response.status_code}")
    except httpx.HTTPError as error:
        refusals.append(f"{method} {path}: {type(error).__name__}")
    else:
        return response
    return None


async def _ask_and_rank(
    visit: _Visit, record: Record, task: Task, notice: str, turn: int, rng: Random
) -> None:
    exchange, answers = await _timed(visit, turn, _ask_once, task, rng.randint(4, 6), rng, notice)
    record.exchanges.append(exchange)
    if answers is None or not answers.recorded:
        return
    scores = tuple(gold_score(task.prompt, text, ended) for text, ended in answers.outputs)
    groups = rank(scores, rng, visit.person.error_rate)
    accepted = await _send(
        visit,
        record.refusals,
        "POST",
        "/v1/feedback/rankings",
        headers={"Idempotency-Key": f"{visit.person.user_id}-{visit.person.seed}-{turn}"},
        json={
            "completion_id": answers.completion_id,
            "groups": groups,
            "instruction_version": INSTRUCTION_VERSION,
            "seconds_spent": round(rng.uniform(5, 60), 1),
            "metadata": {"use_case": task.use_case},
        },
    )
    if accepted:
        judgement = Judgement(answers.completion_id, task.prompt, scores, groups)
        record.judgements.append(judgement)


_Ask = Callable[[_Visit, bool, dict[str, Any], dict[str, str]], Awaitable[_Answers]]


async def _timed(
    visit: _Visit, turn: int, ask: _Ask, task: Task, n: int, rng: Random, notice: str
) -> tuple[Exchange, _Answers | None]:
    """Ask, by turns of both endpoints, and note how long it took and what became of it."""
    chat = turn % 2 == 1
    settings = {
        "model": visit.model,
        "n": n,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "seed": rng.getrandbits(31),
        "extra_body": {"metadata": {"use_case": task.use_case}},
        **_prompt(f"{visit.person.marker} {task.prompt}".lstrip(), chat),
    }
    started, failure, answers = visit.clock(), "", None
    try:
        answers = await ask(visit, chat, settings, _headers(visit.person, notice))
    except Exception as error:  # noqa: BLE001 - whatever stops a request is here to be counted
        # Not the message: it may quote the prompt.
        failure = f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip()
    exchange = Exchange(
        started=started,
        seconds=visit.clock() - started,
        endpoint="chat" if chat else "completions",
        streamed=ask is _ask_streaming,
        release=answers.release if answers else "",
        recorded=answers is not None and answers.recorded,
        failure=failure,
    )
    return exchange, answers


def _prompt(text: str, chat: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text + "\n"}


def _headers(person: Person, notice: str) -> dict[str, str]:
    if person.source == "api":
        return {}
    return {"x-instructloop-source": "playground", "x-instructloop-notice": notice}


async def _ask_once(
    visit: _Visit, chat: bool, settings: dict[str, Any], headers: dict[str, str]
) -> _Answers:
    api = visit.openai.chat.completions if chat else visit.openai.completions
    raw = await api.with_raw_response.create(extra_headers=headers, **settings)
    body = raw.parse()
    choices = sorted(body.choices, key=lambda choice: choice.index)
    return _Answers(
        completion_id=body.id,
        release=_agreed([raw.headers.get("x-policy-release"), body.system_fingerprint]),
        recorded=raw.headers.get("x-instructloop-recorded") == "true",
        outputs=tuple((_text(c, chat), c.finish_reason == "stop") for c in choices),
    )


async def _ask_streaming(
    visit: _Visit, chat: bool, settings: dict[str, Any], headers: dict[str, str]
) -> _Answers:
    api = visit.openai.chat.completions if chat else visit.openai.completions
    raw = await api.with_raw_response.create(stream=True, extra_headers=headers, **settings)
    stamps, texts, finish = [raw.headers.get("x-policy-release")], list[str](), None
    completion_id = ""
    async for chunk in raw.parse():
        completion_id = chunk.id
        stamps.append(chunk.system_fingerprint)
        for choice in chunk.choices:
            texts.append((choice.delta.content if chat else choice.text) or "")
            finish = choice.finish_reason or finish
    if finish is None:
        raise ConnectionError("the stream ended before the answer did")
    return _Answers(
        completion_id=completion_id,
        release=_agreed(stamps),
        recorded=raw.headers.get("x-instructloop-recorded") == "true",
        outputs=(("".join(texts), finish == "stop"),),
    )


def _text(choice: Any, chat: bool) -> str:
    return str((choice.message.content if chat else choice.text) or "")


def _agreed(stamps: Sequence[str | None]) -> str:
    """The one release that all stamps name; empty where one is missing or they differ."""
    first = stamps[0]
    return first if first and all(stamp == first for stamp in stamps) else ""
