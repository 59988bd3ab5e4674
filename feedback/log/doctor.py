"""Says what is wrong with a log, one step after the other, where its client says that it failed."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import LogUnavailable
from contracts.log import Log
from feedback.log import SQLITE, open_log
from feedback.log.address import KAFKA, KafkaAddress, KafkaSettings, parse
from feedback.log.handshake import HandshakeFailed, greet
from feedback.log.spool import ROOMY, SpoolSettings, measure


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str


def examine(url: str, kafka: KafkaSettings, spool: SpoolSettings) -> Iterator[Finding]:
    """Everything about the log at `url`; stops at what the rest depends on. Changes nothing. Raises
    InvalidInput.
    """
    if url.startswith(KAFKA):
        yield from _cluster(parse(url), kafka)
        yield from _spool(spool)
        return
    file = Path(url.removeprefix(SQLITE))
    if not file.is_file():
        yield Finding("file", False, f"{file}: there is none; a server makes it when it starts")
        return
    with closing(open_log(url)) as log:
        yield from _file(file)
        yield from _letters(log)


def _file(path: Path) -> Iterator[Finding]:
    with closing(sqlite3.connect(path)) as db:
        said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        mode = db.execute("PRAGMA journal_mode").fetchone()[0]
    yield Finding("file", said == "ok", f"{path}: {said}")
    yield Finding("journal", mode == "wal", f"{mode}, of wal")


def _cluster(address: KafkaAddress, settings: KafkaSettings) -> Iterator[Finding]:
    reached = False
    for server in address.servers:
        findings = list(_node(server, address, settings))
        yield from findings
        reached = reached or all(finding.ok for finding in findings)
    if not reached:
        return
    from feedback.log.cluster import topic_states
    from feedback.log.kafka import KafkaLog

    try:
        states = topic_states(address, settings)
    except LogUnavailable as e:
        yield Finding("topics", False, str(e))
        return
    for name, state in states.items():
        problems = state.problems(address) if state else []
        detail = "; ".join(problems) or ("as it should be" if state else "made at first use")
        yield Finding(f"topic {name}", not problems, detail)
    if all(states.values()):
        with closing(KafkaLog(address, settings)) as log:
            yield from _letters(log)


def _node(server: str, address: KafkaAddress, settings: KafkaSettings) -> Iterator[Finding]:
    try:
        for step, detail in greet(server, address, settings):
            yield Finding(f"{server} {step}", True, detail)
    except HandshakeFailed as e:
        yield Finding(f"{server} {e.step}", False, e.reason)


def _letters(log: Log) -> Iterator[Finding]:
    try:
        count = len(log.dead_letters())
    except LogUnavailable as e:
        yield Finding("dead letters", False, str(e))
        return
    hint = "; instructloop log letters lists them" if count else ""
    yield Finding("dead letters", count == 0, f"{count}{hint}")


def _spool(settings: SpoolSettings) -> Iterator[Finding]:
    if not settings.path.exists():
        yield Finding("spool", True, f"{settings.path}: not there, nothing waits")
        return
    status = measure(settings.path, settings.max_bytes)
    detail = (
        f"{settings.path}: {status.depth} events wait, the oldest for {status.age_s:.0f} s; "
        f"{status.share:.0%} of its limit"
    )
    yield Finding("spool", status.share < ROOMY, detail)
