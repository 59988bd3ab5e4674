"""The one-command round: a model from scratch, people over HTTP, the loop, a swap, a report."""

import asyncio
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from contracts.errors import GateRefused, InstructloopError
from contracts.events import Stamper
from contracts.log import Log
from contracts.release import Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from demo import leaks
from demo.gold import gold_score
from demo.people import Exchange, Person, everyone_takes_part, keep_asking, population
from demo.raters import ceiling
from demo.server import running
from demo.tasks import base_text, demonstration, make_task
from feedback import notice
from feedback.vault import open_events
from instructloop.config import RoundConfig, load_config
from instructloop.loop import describe, parent_of, publish, train_candidate
from instructloop.report import write_report
from instructloop.round import STAGES, round_report
from instructloop.stages import Say, Stages
from instructloop.version import code_version
from instructloop.work import Loop
from serving.access import KeyStore
from training.data import PromptRow, prompt_text, read_set
from training.model import hide_progress_bars

CONFIG = Path(__file__).with_name("demo.toml")
PEOPLE = 136
PROMPTS_EACH = 30
DEMONSTRATIONS = 56_000
# Fewer demonstrations each than the dataset takes of one person.
LABELERS = 300
DOCUMENTS = 8_000
# People who keep asking around the swap, and how long they go on on each side of it.
ASKING = 6
ASKING_SECONDS = 4.0
SWAP_SECONDS = 120.0


@dataclass(frozen=True)
class Demo:
    """One run of the demo below `home`."""

    home: Path
    config: RoundConfig
    stages: Stages
    say: Say

    @property
    def registry(self) -> ReleaseRegistry:
        return ReleaseRegistry(self.config.registry)

    @property
    def keys(self) -> Path:
        return self.home / "keys.db"

    def people(self, issue: Callable[[str, bool], str]) -> list[Person]:
        """The same people each time; `issue` gives each a key."""
        return population(self.config.seed, PEOPLE, issue)

    def issue_key(self, user: str, production: bool) -> str:
        return KeyStore(self.keys).create(user, production)[0]

    @contextmanager
    def server(self) -> Iterator[str]:
        arguments = [
            *("--log", self.config.log),
            *("--registry", str(self.config.registry)),
            *("--keys", str(self.keys)),
        ]
        with running(arguments, self.home / "server.log") as url:
            yield url


def run_demo(seed: int, folder: Path, say: Say) -> dict[str, Any]:
    """One whole round below `folder`/seed-N; the report is `folder`/report.json and report.html.

    A run that was interrupted goes on after its last finished stage; a finished one is run anew.
    """
    hide_progress_bars()
    demo = prepare(seed, folder, say)
    started = time.perf_counter()

    # 1-2. Demonstrations, base model and SFT policy: what the loop starts from.
    documents = list(base_text(random.Random(f"text:{seed}"), DOCUMENTS))
    log = open_events(demo.config.log) if demo.stages.done("people") else _fresh_log(demo)
    loop = Loop(demo.config, log, log, demo.registry, demo.stages, documents, code_version())
    before = parent_of(loop)
    if demo.registry.current_id() != before.id and not demo.stages.done("swap"):
        # Stopped between release and swap: the swap is still to be seen.
        demo.registry.publish(before)

    # 3-5. Serve it; people ask and rank over HTTP.
    demo.say("server: starting vLLM ...")
    with demo.server() as url:
        people = demo.people(demo.issue_key)
        demo.stages.run("people", lambda _: _people(people, url))

        # 6-9. Dataset, reward model, policy, evaluation, gate.
        try:
            candidate, reasons = train_candidate(loop), list[str]()
        except GateRefused as refused:
            candidate, reasons = None, refused.reasons
        # 10. Release, and swap under traffic.
        after = before
        if candidate is not None:
            after = describe(loop, candidate)
            demo.stages.run("swap", lambda _: _swap(loop, people, url, after))

    # 11. Report.
    report = _report(demo, loop, before, after, reasons)
    report["seconds"] = round(time.perf_counter() - started, 1)
    log.close()
    write_report(report, demo.home)
    write_report(report, folder)
    return report


def prepare(seed: int, folder: Path, say: Say) -> Demo:
    """The run's folder, emptied if it holds a finished run."""
    home = folder / f"seed-{seed}"
    if (home / "report.json").exists():
        shutil.rmtree(home)
    config = load_config(
        CONFIG,
        seed=seed,
        run=home,
        log=f"sqlite:///{home / 'log.db'}",
        registry=home / "registry",
    )
    identity = {"config": config.model_dump(mode="json"), "code": code_version()}
    fresh = not (home / STAGES).exists()
    stages = Stages(home / STAGES, identity, say)
    if not fresh and not any((home / STAGES).glob("*/result.json")):
        shutil.rmtree(home / "registry", ignore_errors=True)
    return Demo(home, config, stages, say)


def gold_judge() -> Callable[[Sequence[PromptRow], Sequence[str], Sequence[bool]], list[float]]:
    """The raters' true taste as a judge of the loop's evaluation; the loop never trains on it."""
    return lambda rows, texts, finished: [
        gold_score(prompt_text(row), text, done)
        for row, text, done in zip(rows, texts, finished, strict=True)
    ]


def _fresh_log(demo: Demo) -> Log:
    """A log that holds the demonstrations only: what half a crowd said before an interruption is
    not counted.
    """
    for leftover in [*demo.home.glob("log.*"), *demo.home.glob("keys.db*")]:
        leftover.unlink()
    log = open_events(demo.config.log)
    log.append(list(demonstration_events(demo.config.seed)))
    return log


def demonstration_events(seed: int) -> Iterator[pb.Event]:
    """What labelers wrote: instructions with answers, imperfect on purpose. The same events for the
    same seed.
    """
    stamper = Stamper("demo")
    rng = random.Random(f"demonstrations:{seed}")

    def event(user: str, body: Any) -> pb.Event:
        return stamper.event(
            user, body, id=str(uuid.UUID(int=rng.getrandbits(128), version=4)), at=0.0
        )

    labelers = [f"labeler-{i:03d}" for i in range(LABELERS)]
    agreed = {"notice_version": notice.CURRENT.version}
    for labeler in labelers:
        consent = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=notice.CURRENT.version)
        yield event(labeler, consent)
    for i in range(DEMONSTRATIONS):
        task = make_task(rng)
        yield event(
            labelers[i % len(labelers)],
            pb.Demonstration(
                prompt=pb.Prompt(messages=[pb.Message(role="user", content=task.prompt)]),
                response=demonstration(task, rng),
                source=pb.SOURCE_LABELER,
                metadata={"use_case": task.use_case},
                **agreed,
            ),
        )


def _people(people: Sequence[Person], url: str) -> dict[str, Any]:
    records = asyncio.run(everyone_takes_part(people, url, PROMPTS_EACH))
    exchanges = [e for r in records for e in r.exchanges]
    return {
        "people": len(records),
        "requests": len(exchanges),
        "failures": [e.failure for e in exchanges if e.failure],
        "refusals": [refusal for r in records for refusal in r.refusals],
        "unstamped": sum(e.unstamped for e in exchanges),
        "judgements": [
            {"user": r.person.user_id, "scores": j.scores, "groups": j.groups}
            for r in records
            for j in r.judgements
        ],
    }


def _swap(loop: Loop, people: Sequence[Person], url: str, after: Release) -> dict[str, Any]:
    """Publish while people keep asking; what they saw, and what the server says of the swap."""
    asking = [p for p in people if p.opted_in and not p.withdraws][:ASKING]

    async def around() -> list[list[Exchange]]:
        over = asyncio.Event()
        clients = [asyncio.create_task(keep_asking(p, url, over, clock=time.time)) for p in asking]
        try:
            await asyncio.sleep(ASKING_SECONDS)
            await asyncio.to_thread(publish, loop, after)
            await _serves(url, asking[0].key, after.id)
            await asyncio.sleep(ASKING_SECONDS)
        finally:
            over.set()
        return [await client for client in clients]

    exchanges = [e for person in asyncio.run(around()) for e in person]
    change = _changes(url, asking[0].key)["data"][-1]
    at = min((e.started for e in exchanges if e.release == after.id), default=0.0)
    return {
        **{k: change[k] for k in ("stage_ms", "drain_ms", "pause_ms")},
        "requests_during": len(exchanges),
        "failed": sum(bool(e.failure) for e in exchanges),
        "unstamped": sum(e.unstamped for e in exchanges),
        "releases_seen": sorted({e.release for e in exchanges if e.release}),
        "latencies": [
            {"at": e.started - at, "seconds": e.seconds, "release": e.release}
            for e in sorted(exchanges, key=lambda e: e.started)
        ],
    }


async def _serves(url: str, key: str, release_id: str) -> None:
    deadline = time.monotonic() + SWAP_SECONDS
    while time.monotonic() < deadline:
        answer = await asyncio.to_thread(_changes, url, key)
        if answer["serving"] == release_id:
            return
        refused = [
            c for c in answer["data"] if c["release"] == release_id and c["outcome"] == "refused"
        ]
        if refused:
            raise InstructloopError(f"the server refused {release_id}: {refused[-1]['reason']}")
        await asyncio.sleep(0.1)
    raise InstructloopError(f"the server does not serve {release_id} after {SWAP_SECONDS:.0f} s")


def _changes(url: str, key: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/v1/releases", headers={"Authorization": f"Bearer {key}"}, timeout=30)
    answer.raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


def _report(
    demo: Demo, loop: Loop, before: Release, after: Release, reasons: list[str]
) -> dict[str, Any]:
    stages = demo.stages
    report = round_report(loop, before.id, after.id, reasons, judge="gold")
    gold = report["policy"]["win_rates"]["gold"]
    report["policy"] |= {"gold_win_rate": gold["mean"], "gold_win_rate_ci95": gold["ci95"]}
    people = stages.result("people")
    digest = stages.result("dataset")["digest"]
    held_out = {r.rater_id for r in read_set(loop.registry.artifacts.path(digest), "rm", "test")}
    judged = [(j["scores"], j["groups"]) for j in people["judgements"] if j["user"] in held_out]
    report["reward_model"]["ceiling"] = ceiling(judged)
    report["people"] = {k: v for k, v in people.items() if k != "judgements"}
    if stages.done("swap"):
        report["swap"] = stages.result("swap")
    report["consent"] = asdict(
        leaks.search(demo.home, loop.source, demo.people(issue=lambda *_: ""))
    )
    report["stages"] = stages.seconds()
    return report
