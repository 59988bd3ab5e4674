"""Erasure: of two thousand people one thousand are erased, on the embedded log and on Kafka. How
long does it take, and can anybody still read what they said?

It is looked for in what consumers read, in every byte below the logs' folder, and in a copy of the
embedded log that was made before, as a backup is, opened with the keys that are there afterwards.
Then the words of people who never agreed, withdrew or erased go down every path of a server, and
all that it wrote is searched for them. QUICK=1 takes one hundred people.
"""

import os
import random
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks.result import Figure, figure
from contracts.events import Stamper
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback import notice
from feedback.log import open_log
from feedback.rights import Rights
from feedback.vault import open_events, open_vault
from feedback.vault.sealed import SealedLog
from tests.e2e.markers import search

QUICK = os.environ.get("QUICK", "") not in ("", "0")
PEOPLE = 100 if QUICK else 2000
SAID = 5


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        embedded = root / "embedded"
        embedded.mkdir()
        figures = _erased("embedded", f"sqlite:///{embedded}/log.db", embedded)
        cluster = Cluster(root / "broker").start()
        try:
            url = f"kafka://{cluster.bootstrap}/erasure?replication=1"
            figures += _erased("kafka", url, root)
        finally:
            cluster.stop()
        aside = root / "markers"
        aside.mkdir()
        return figures + _leaked(aside)


def _leaked(folder: Path) -> list[Figure]:
    found = search(folder)
    for marker, place in found.leaked.items():
        print(f"{marker} is in {place}")
    return [
        figure("leaked_markers", [len(found.leaked)], "markers", "0"),
        figure("markers_searched", [found.markers], "markers"),
        figure("marker_requests", [found.requests], "requests"),
        figure("marker_bytes_searched", [found.bytes], "bytes"),
    ]


def _erased(name: str, url: str, folder: Path) -> list[Figure]:
    rng, vault = random.Random(1), folder / "log.vault.db"
    people = {f"person-{i}": f"marker-{rng.getrandbits(96):024x}" for i in range(PEOPLE)}
    erased = dict(list(people.items())[: PEOPLE // 2])
    with closing(open_events(url, vault)) as log:
        _say(log, people)
        if missing := people.keys() - _readable(log, people):
            raise RuntimeError(f"{name}: expected all texts before, {len(missing)} are missing")
        backup = _backup(folder / "log.db") if name == "embedded" else None
        rights, taken = Rights(log, log, None), []
        for person in erased:
            began = time.perf_counter()
            rights.withdraw(person, erase=True)
            taken.append(time.perf_counter() - began)
        readable = _readable(log, erased)
        counted = sum(log.unreadable.values())
        kept = _readable(log, people) - erased.keys()
    if backup is not None:
        with closing(SealedLog(open_log(f"sqlite:///{backup}"), open_vault(url, vault))) as old:
            readable |= _readable(old, erased)
    readable |= _in_bytes(folder, erased)
    return [
        figure(f"erased_{name}", [len(erased)], "people", ">= 1000"),
        figure(f"erased_readable_{name}", [len(readable)], "people", "0"),
        figure(f"kept_unreadable_{name}", [PEOPLE - len(erased) - len(kept)], "people", "0"),
        figure(f"skipped_and_counted_{name}", [counted], "records"),
        figure(f"erasure_s_{name}", taken, "s for one person", "<= 60"),
    ]


def _say(log: SealedLog, people: dict[str, str]) -> None:
    stamper, version = Stamper("benchmark"), notice.CURRENT.version
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version=version)
    for person, marker in people.items():
        said = [
            pb.Completion(
                completion_id=f"cmpl-{person}-{i}",
                prompt=pb.Prompt(text=f"{marker} says something"),
                outputs=[pb.Output(index=0, text=f"{marker} was said", finish_reason="stop")],
                source=pb.SOURCE_API,
                release_id="r0001",
                notice_version=version,
            )
            for i in range(SAID)
        ]
        log.append([stamper.event(person, granted), *(stamper.event(person, s) for s in said)])


def _readable(log: SealedLog, people: dict[str, str]) -> set[str]:
    """Whose texts a consumer reads."""
    texts = [str(record.event.completion) for record in follow(log, "completions", {})]
    whole = "\n".join(texts)
    return {person for person, marker in people.items() if marker in whole}


def _in_bytes(folder: Path, people: dict[str, str]) -> set[str]:
    """Whose texts stand in some file."""
    contents = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        person
        for person, marker in people.items()
        if any(marker.encode() in content for content in contents)
    }


def _backup(path: Path) -> Path:
    """A copy that SQLite makes of a file in use."""
    copy = path.with_name("backup.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy
