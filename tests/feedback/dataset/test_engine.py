"""Every engine, and whatever was kept of earlier builds, gives the digest of one from nothing."""

import importlib.util
import os
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dataset import fill
from contracts.artifact import ArtifactStore
from contracts.log import EventSource
from contracts.release import ReleaseRegistry
from feedback.dataset.build import build_dataset
from feedback.dataset.engine import Engine, Here, Processes
from feedback.dataset.segment import Outlines, Segment
from feedback.dataset.settings import RuleSettings
from feedback.rights import Rights
from feedback.vault import open_events
from feedback.vault.sealed import SealedLog
from tests.feedback.samples import completion, consent, ranking

RULES = RuleSettings(min_rater_pairs=2)


class Counting(Here):
    """An engine that says what it was asked to read."""

    def __init__(self, source: EventSource) -> None:
        super().__init__(source)
        self.tasks: list[Any] = []

    def map(self, work, tasks):  # type: ignore[no-untyped-def]
        self.tasks += tasks
        return super().map(work, tasks)

    def outlined(self) -> list[tuple[str, int]]:
        """Topic and first offset of each segment that was read anew."""
        return [(s.topic, s.start) for s, n in self.tasks if isinstance(n, int)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def log(url: str) -> Iterator[SealedLog]:
    log = open_events(url)
    yield log
    log.close()


def build(log: SealedLog, folder: Path, engine: Engine, outlines: Outlines | None = None) -> str:
    store = ArtifactStore(folder / "artifacts")
    return build_dataset(log, store, RULES, "test", engine=engine, outlines=outlines)


def test_processes_give_the_digest_of_one(log: SealedLog, url: str, tmp_path: Path) -> None:
    fill(log.append, 300, seed=2)
    alone = build(log, tmp_path, Here(log))
    outlines = Outlines(events=100)
    with Processes(partial(open_events, url), 2) as engine:
        assert build(log, tmp_path, engine, outlines) == alone


def test_spark_gives_the_digest_of_one(log: SealedLog, url: str, tmp_path: Path) -> None:
    if not (importlib.util.find_spec("pyspark") and shutil.which("java")):
        assert not os.environ.get("CI"), "make spark"
        pytest.skip("needs pyspark and Java 17")
    from feedback.dataset.spark import Spark

    fill(log.append, 300, seed=3)
    alone = build(log, tmp_path, Here(log))
    outlines = Outlines(events=100)
    with Spark(partial(open_events, url), "local[2]") as engine:
        assert build(log, tmp_path, engine, outlines) == alone


def test_a_second_build_reads_only_what_is_new(log: SealedLog, tmp_path: Path) -> None:
    def ask(first: int, last: int) -> None:
        for i in range(first, last):
            log.append([completion("ann", f"c{i}", f"Tell me of bird number {i}.")])

    log.append([consent("ann", at=1)])
    ask(0, 10)
    outlines = Outlines(tmp_path / "outlines", events=5)
    first = Counting(log)
    build(log, tmp_path, first, outlines)
    assert first.outlined() == [("completions", 0), ("completions", 5)]
    ask(10, 17)
    log.append([ranking("ann", "c3")])
    second = Counting(log)
    digest = build(log, tmp_path, second, outlines)
    assert second.outlined() == [("completions", 10), ("completions", 15), ("rankings", 0)]
    assert digest == build(log, tmp_path, Here(log))


def test_what_was_kept_is_of_one_code_one_log_and_one_length_of_prefix(
    log: SealedLog, tmp_path: Path
) -> None:
    log.append([completion("ann", f"c{i}") for i in range(5)])
    outlines = Outlines(tmp_path / "outlines", events=5)

    def read_anew(source: SealedLog, chars: int, code: str) -> bool:
        engine = Counting(source)
        list(outlines.read(source, engine, "completions", {0: 5}, chars, code))
        return bool(engine.tasks)

    other = open_events(f"sqlite:///{tmp_path}/other.db")
    other.append([completion("ann", f"c{i}") for i in range(5)])
    assert read_anew(log, 200, "1") and not read_anew(log, 200, "1")
    assert read_anew(log, 200, "2") and read_anew(log, 100, "1") and read_anew(other, 200, "1")
    other.close()


def test_a_file_that_was_cut_off_is_read_again(log: SealedLog, tmp_path: Path) -> None:
    log.append([completion("ann", f"c{i}") for i in range(5)])
    outlines = Outlines(tmp_path, events=5)
    (before,) = outlines.read(log, Here(log), "completions", {0: 5}, 200, "1")
    (file,) = tmp_path.glob("*.outlines")
    file.write_bytes(file.read_bytes()[:-9])
    (again,) = outlines.read(log, Here(log), "completions", {0: 5}, 200, "1")
    assert again == before


def test_withdrawal_and_erasure_reach_what_was_kept(log: SealedLog, tmp_path: Path) -> None:
    people = ("ann", "bob", "cat")
    log.append([consent(who, at=1) for who in people])
    rng = random.Random(1)
    for who in people:
        log.append(
            [completion(who, f"{who}{i}", f"{who} asks {rng.random()}", at=2) for i in range(5)]
        )
    registry = ReleaseRegistry(tmp_path)
    outlines = Outlines.below(registry, events=5)
    build(log, tmp_path, Here(log), outlines)
    rights = Rights(log, log, registry)

    rights.withdraw("ann")
    engine = Counting(log)
    digest = build(log, tmp_path, engine, outlines)
    assert engine.outlined() == []
    assert digest == build(log, tmp_path, Here(log))

    rights.withdraw("bob", erase=True)
    kept = [file.read_bytes() for file in registry.root.glob("outlines/*")]
    assert len(kept) == 2 and not any(b"bob" in file for file in kept)
    engine = Counting(log)
    digest = build(log, tmp_path, engine, outlines)
    assert engine.outlined() == [("completions", 5)]
    assert digest == build(log, tmp_path, Here(log))


def test_a_segment_from_before_an_erasure_is_not_used(log: SealedLog, tmp_path: Path) -> None:
    log.append([completion("ann", f"c{i}") for i in range(5)])
    outlines = Outlines(tmp_path, events=5)
    list(outlines.read(log, Here(log), "completions", {0: 5}, 200, "1"))
    log.vault.erase("ann")
    assert list(outlines.read(log, Here(log), "completions", {0: 5}, 200, "1")) == [(0, ())]


def test_what_is_kept_holds_no_text(log: SealedLog, tmp_path: Path) -> None:
    log.append([completion("ann", f"c{i}", "a marker of mine", ("marked",)) for i in range(5)])
    list(Outlines(tmp_path, events=5).read(log, Here(log), "completions", {0: 5}, 200, "1"))
    (file,) = tmp_path.glob("*.outlines")
    assert b"mark" not in file.read_bytes()


def test_segments_cover_every_offset_once() -> None:
    from feedback.dataset.segment import cut

    assert cut("rankings", {1: 3, 0: 0}, 2) == [
        Segment("rankings", 1, 0, 2),
        Segment("rankings", 1, 2, 3),
    ]
