"""RankME (quality, naturalness): CSV in which a worker scores five outputs for one E2E input."""

import datetime as dt
import math

from contracts.errors import InvalidInput
from contracts.v1 import events_pb2 as pb
from feedback.importers import e2e
from feedback.importers.files import csv_rows
from feedback.importers.row import (
    Format,
    Raw,
    Said,
    author_of,
    digest,
    groups_by,
    outputs,
    text_of,
)

_K = 5
_OUTPUTS = tuple(f"ref{i + 1}" for i in range(_K))
_COLUMNS = ("mr", "_worker_id", "_trust", "_started_at", "_created_at", *_OUTPUTS)
# What was scored, to the head of its columns.
_SCORES = {"quality": "quality", "naturalness": "natur"}
INSTRUCTIONS = "rankme"


def _says(raw: Raw) -> list[Said]:
    """The five outputs as a completion, and the worker's order over those that differ."""
    row = raw.value
    criterion = next((c for c, head in _SCORES.items() if f"{head}1" in row), None)
    if criterion is None:
        raise InvalidInput("columns", "quality1..5 or natur1..5", "neither")
    prompt = e2e.prompt_of(raw)
    texts = [text_of(row[name], name) for name in _OUTPUTS]
    scores = {i: _score(row, f"{_SCORES[criterion]}{i + 1}") for i in _first_of_each(texts)}
    if len(scores) < 2:
        raise InvalidInput("ref1..5", "two outputs that differ", "five times the same")
    # One completion for one question about one set of outputs, whoever answers it.
    asked = "\0".join((criterion, row["mr"], *texts))
    completion = pb.Completion(
        completion_id=f"rankme-{digest(asked)[:24]}",
        prompt=prompt,
        outputs=outputs(texts),
        metadata=e2e.USE_CASE,
    )
    started, created = _time(row, "_started_at"), _time(row, "_created_at")
    ranking = pb.Ranking(
        completion_id=completion.completion_id,
        groups=groups_by(scores, highest_first=True),
        instruction_version=INSTRUCTIONS,
        seconds_spent=max(0.0, created - started),
        metadata=_about(row, criterion),
    )
    worker = text_of(row["_worker_id"], "_worker_id")
    return [
        Said(author_of(e2e.AUTHORS, prompt), completion),
        Said(f"rankme:{worker}", ranking, at=created),
    ]


def _first_of_each(texts: list[str]) -> list[int]:
    """The first of those equal in letters and digits (dupl_ref1..5): they cannot be ordered."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault("".join(c for c in text.casefold() if c.isalnum()), i)
    return sorted(first.values())


def _score(row: dict[str, str], column: str) -> float:
    """Any magnitude that the worker liked; only the order counts."""
    try:
        score = float(row[column])
    except (KeyError, ValueError):
        score = math.nan
    if not math.isfinite(score) or score < 0:
        raise InvalidInput(column, "a finite number >= 0", row.get(column))
    return score


def _time(row: dict[str, str], column: str) -> float:
    """Month/day/year, taken as UTC: the file names no time zone."""
    try:
        time = dt.datetime.strptime(f"{row[column]} +0000", "%m/%d/%Y %H:%M:%S %z")
    except ValueError:
        raise InvalidInput(column, "month/day/year hours:minutes:seconds", row[column]) from None
    return time.timestamp()


def _about(row: dict[str, str], criterion: str) -> dict[str, str]:
    """The worker's trust, and whether each output is ok, or has facts added or missing, or both."""
    checks = {f"check{i + 1}": " ".join(row.get(f"check{i + 1}", "").split()) for i in range(_K)}
    about = {"criterion": criterion, "trust": row["_trust"]} | checks
    return {key: value for key, value in about.items() if value}


FORMAT = Format(licence="unclear", rows=lambda path: csv_rows(path, _COLUMNS), says=_says)
