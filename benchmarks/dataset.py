"""Time and memory of a dataset build, all rules on; EVENTS says how many, else 1,000,000."""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.result import Figure, figure
from contracts.artifact import ArtifactStore
from contracts.events import Stamper
from contracts.v1 import events_pb2 as pb
from feedback.dataset.build import build_dataset
from feedback.dataset.engine import Processes
from feedback.dataset.settings import RuleSettings
from feedback.vault import open_events

MILLION = 1_000_000
BATCH = 2000
CORES = 2
# Of a round's events: what most people do, they do seldom (Zipf, exponent 1.2).
SHARES = (("completion", 0.6), ("ranking", 0.35), ("demonstration", 0.05))
WORDS = (
    "write a letter about the old house near river please explain how bread rises in warm oven "
    "summarise this story of two friends who cross mountains list ideas for garden in spring"
).split()


def measure() -> list[Figure]:
    count = int(os.environ.get("EVENTS", MILLION))
    name = "1m" if count == MILLION else str(count)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/log.db"
        log = open_events(url)
        fill(log.append, count, seed=1)
        log.close()
        runs = [_build(url, Path(folder) / str(i)) for i in range(3)]
    assert len({digest for _, _, digest in runs}) == 1, "three builds, more than one digest"
    return [
        figure(f"seconds_{name}", [s for s, _, _ in runs], "s", "<= 120 for 1m"),
        figure(f"gib_{name}", [g for _, g, _ in runs], "GiB", "<= 4 for 1m"),
    ]


def fill(append: Callable[[list[pb.Event]], None], count: int, seed: int) -> None:
    """`count` events of skewed users, who all agree first."""
    batch = list[pb.Event]()
    for event in _events(count, random.Random(seed)):
        batch.append(event)
        if len(batch) == BATCH:
            append(batch)
            batch = []
    append(batch)


def _events(count: int, rng: random.Random) -> Iterator[pb.Event]:
    stamper = Stamper("bench", entropy=rng.randbytes)
    people = max(10, count // 50)
    users = [f"user-{i}" for i in range(people)]
    weights = [1 / (i + 1) ** 1.2 for i in range(people)]
    for user in users:
        granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version="1")
        yield stamper.event(user, granted, at=1.0)
    kinds = rng.choices([k for k, _ in SHARES], [s for _, s in SHARES], k=count)
    owners = rng.choices(users, weights, k=count)
    asked: dict[str, list[str]] = {}
    for number, (kind, user) in enumerate(zip(kinds, owners, strict=True)):
        body = _body(kind, number, asked.setdefault(user, []), rng)
        body.source, body.notice_version = pb.SOURCE_API, "1"
        yield stamper.event(user, body, at=2.0)


def _body(
    kind: str, number: int, asked: list[str], rng: random.Random
) -> pb.Completion | pb.Ranking | pb.Demonstration:
    if kind == "ranking" and asked:
        groups = [pb.RankGroup(outputs=[i]) for i in rng.sample(range(4), 4)]
        return pb.Ranking(completion_id=asked.pop(), groups=groups)
    prompt = pb.Prompt(text=_text(rng, 30))
    if kind == "demonstration":
        return pb.Demonstration(prompt=prompt, response=_text(rng, 40))
    asked.append(f"cmpl-{number}")
    outputs = [pb.Output(index=i, text=_text(rng, 40), finish_reason="stop") for i in range(4)]
    return pb.Completion(
        completion_id=f"cmpl-{number}", prompt=prompt, outputs=outputs, release_id="r1"
    )


def _text(rng: random.Random, words: int) -> str:
    text = " ".join(rng.choices(WORDS, k=rng.randint(words // 2, words)))
    return f"{text} mail a{rng.randint(0, 999)}@example.com" if rng.random() < 0.02 else text


def _build(url: str, store: Path) -> tuple[float, float, str]:
    """(seconds, GiB at the most, digest) of a build in a process of its own."""
    code = f"from benchmarks.dataset import build; build({url!r}, {str(store)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, gib, digest = json.loads(done.stdout)
    return seconds, gib, digest


def build(url: str, store: str) -> None:
    """With a process for each of two cores; the memory is this process's and twice the larger's."""
    started = time.perf_counter()
    log = open_events(url)
    with Processes(partial(open_events, url), CORES) as engine:
        artifacts = ArtifactStore(Path(store))
        digest = build_dataset(log, artifacts, RuleSettings(), "bench", engine=engine)
    seconds = time.perf_counter() - started
    own, others = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps([seconds, own + CORES * others, digest]))
