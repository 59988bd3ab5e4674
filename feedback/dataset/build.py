"""Events to examples and manifest: the log up to now, through the rules, into Parquet files."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.artifact import ArtifactStore
from contracts.dataset import (
    INDEX,
    INDEX_COLUMNS,
    MANIFEST,
    PPO_COLUMNS,
    RM_COLUMNS,
    SETS,
    SFT_COLUMNS,
    SPLITS,
    DatasetManifest,
    RuleCount,
    SetName,
    Split,
)
from contracts.events import prompt_text, ranks_of
from contracts.log import EventSource, Record, end_offsets, follow
from contracts.v1 import events_pb2 as pb
from feedback.consent import fold
from feedback.dataset.row import Given, Row, Share
from feedback.dataset.rules import apply_rules, rows_per_set
from feedback.dataset.settings import RuleSettings

# In the order in which their ends are read: a ranking comes after its completion, and the
# consents last, so that no withdrawal made before the build is missed.
_READ = ("rankings", "completions", "demonstrations", "withdrawals", "consents")

_SOURCE_NAME = {
    pb.SOURCE_PLAYGROUND: "playground",
    pb.SOURCE_API: "api",
    pb.SOURCE_LABELER: "labeler",
    pb.SOURCE_IMPORT: "import",
}
# Prompts for PPO are what people asked; a labeler's own are for SFT and RM (InstructGPT, table 6).
_PPO_SOURCES = ("playground", "api", "import")

# Whose metadata may name known answers, as "better>worse" output indices with commas between.
_KNOWN_ANSWERS, _TRUSTED_SOURCES = "known_answers", (pb.SOURCE_LABELER, pb.SOURCE_IMPORT)

_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "masked": pa.list_(pa.string()),
    "annotations": pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())])),
    "responses": pa.list_(pa.string()),
    "finished": pa.list_(pa.bool_()),
    "ranks": pa.list_(pa.int32()),
}
_COLUMNS: dict[SetName, tuple[str, ...]] = {
    "sft": SFT_COLUMNS,
    "rm": RM_COLUMNS,
    "ppo": PPO_COLUMNS,
}

Ends = Mapping[str, Mapping[int, int]]


def build_dataset(
    source: EventSource,
    store: ArtifactStore,
    rules: RuleSettings,
    code_version: str,
    *,
    decisions: Mapping[str, bool] | None = None,
    until: Ends | None = None,
) -> str:
    """Build the dataset of the events so far, or `until` given ends; its digest in `store`.

    The same events, rules, decisions of reviewers and code give the same digest on any machine. An
    event that cannot be read any more, because its person erased it, is not there.
    """
    ends = end_offsets(source, _READ) if until is None else until
    consents = fold(follow(source, "consents", {}, dict(ends["consents"])))
    rows, known = _rows(source, ends)
    kept, counts = apply_rules(rows, Given(rules, consents, decisions or {}))
    manifest = DatasetManifest(
        events={t: {p: (0, end) for p, end in of.items()} for t, of in sorted(ends.items())},
        rules=(known, *counts),
        rows=_rows_per_split(kept),
        people=_rows_per_person(kept),
        use_cases={name: _use_cases(kept, name) for name in SETS},
        lengths={name: _lengths(kept, name) for name in SETS},
        code_version=code_version,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS:
            rows_of = [r for r in kept if r.set == name]
            _write(Path(folder) / f"{name}.parquet", _COLUMNS[name], rows_of)
        _write(Path(folder) / INDEX, INDEX_COLUMNS, kept)
        (Path(folder) / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        return store.put("dataset", Path(folder))


def _rows(source: EventSource, ends: Ends) -> tuple[list[Row], RuleCount]:
    """Every event as rows; and how many rankings name a completion and outputs that exist."""
    completed = list(_follow(source, "completions", ends))
    completions: dict[str, pb.Event] = {}
    for record in completed:
        completions.setdefault(record.event.completion.completion_id, record.event)
    # What its owner took back is unknown from here on, and so is every ranking of it.
    withdrawn = {
        (record.event.user_id, record.event.withdrawal.completion_id)
        for record in _follow(source, "withdrawals", ends)
    }
    for key in [k for k, event in completions.items() if (event.user_id, k) in withdrawn]:
        del completions[key]
    prompts = [row for event in completions.values() for row in _ppo_row(event)]
    demonstrations = [_sft_row(r) for r in _follow(source, "demonstrations", ends)]
    rankings = list(_follow(source, "rankings", ends))
    ranked = [row for record in rankings for row in _rm_row(record, completions)]
    rows = [*demonstrations, *ranked, *prompts]
    rows_out = rows_per_set(rows)
    read = {
        "completions": len(completed),
        "demonstrations": len(demonstrations),
        "rankings": len(rankings),
    }
    known = RuleCount(
        rule="completion_known",
        version=2,
        rows_in=rows_out | {"rm": len(rankings)},
        rows_out=rows_out,
        settings={},
        notes={
            "withdrawn": len(withdrawn),
            **{f"{t}_not_readable": sum(ends[t].values()) - n for t, n in read.items()},
        },
    )
    return rows, known


def _follow(source: EventSource, topic: str, ends: Ends) -> Iterator[Record]:
    return follow(source, topic, {}, dict(ends[topic]))


def _share(event: pb.Event, body: pb.Completion | pb.Ranking | pb.Demonstration) -> Share:
    at = event.time.ToNanoseconds() / 1e9
    return Share(event.user_id, _SOURCE_NAME[body.source], body.notice_version, at)


def _prompt_row(set_: SetName, event: pb.Event, body: pb.Completion | pb.Demonstration) -> Row:
    return Row(
        set=set_,
        id=event.id,
        owner=_share(event, body),
        text=body.prompt.text,
        messages=tuple((m.role, m.content) for m in body.prompt.messages),
        words=prompt_text(body.prompt),
        use_case=body.metadata.get("use_case", ""),
        completion_id=body.completion_id if isinstance(body, pb.Completion) else "",
    )


def _ppo_row(event: pb.Event) -> Iterator[Row]:
    row = _prompt_row("ppo", event, event.completion)
    if row.owner.source in _PPO_SOURCES:
        yield row


def _sft_row(record: Record) -> Row:
    body = record.event.demonstration
    return replace(_prompt_row("sft", record.event, body), responses=(body.response,))


def _rm_row(record: Record, completions: Mapping[str, pb.Event]) -> Iterator[Row]:
    """The ranked outputs in the completion's order; nothing where one of them does not exist."""
    event, body = record.event, record.event.ranking
    completed = completions.get(body.completion_id)
    ranks = ranks_of(body)
    if completed is None or max(ranks) >= len(completed.completion.outputs):
        return
    outputs = [completed.completion.outputs[i] for i in sorted(ranks)]
    yield replace(
        _prompt_row("rm", completed, completed.completion),
        id=event.id,
        responses=tuple(output.text for output in outputs),
        finished=tuple(output.finish_reason == "stop" for output in outputs),
        ranks=tuple(ranks[output.index] for output in outputs),
        rater=_share(event, body),
        annotations=tuple(sorted(body.metadata.items())),
        known=_known_answers(completed.completion, sorted(ranks)),
        release_id=completed.completion.release_id,
        offset=record.offset,
    )


def _known_answers(body: pb.Completion, ranked: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(better, worse) as positions in `ranked`; what names other outputs is left out."""
    said = body.metadata.get(_KNOWN_ANSWERS, "") if body.source in _TRUSTED_SOURCES else ""
    at = {str(output): position for position, output in enumerate(ranked)}
    pairs = [pair.strip().split(">") for pair in said.split(",") if pair.count(">") == 1]
    return tuple((at[a], at[b]) for a, b in pairs if a in at and b in at)


def _rows_per_split(rows: Sequence[Row]) -> dict[SetName, dict[Split, int]]:
    counts = Counter((row.set, row.split) for row in rows)
    return {name: {split: counts[name, split] for split in SPLITS} for name in SETS}


def _rows_per_person(rows: Iterable[Row]) -> dict[str, int]:
    counts = Counter(user_id for row in rows for user_id in {s.user_id for s in row.people})
    return dict(sorted(counts.items()))


def _use_cases(rows: Sequence[Row], name: SetName) -> dict[str, int]:
    return dict(sorted(Counter(row.use_case for row in rows if row.set == name).items()))


def _lengths(rows: Sequence[Row], name: SetName) -> dict[str, dict[str, int]]:
    mine = [row for row in rows if row.set == name]
    lengths = {
        "prompt": [len(row.words) for row in mine],
        "response": [len(text) for row in mine for text in row.responses],
    }
    return {what: _spread(sorted(of)) for what, of in lengths.items() if of}


def _spread(ordered: Sequence[int]) -> dict[str, int]:
    at = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}


def _write(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    schema = pa.schema([(column, _TYPES.get(column, pa.string())) for column in columns])
    table = pa.Table.from_pylist([_cells(row) for row in rows], schema=schema)
    pq.write_table(table, path, compression="zstd", version="2.6", row_group_size=65_536)


def _cells(row: Row) -> dict[str, object]:
    """Every column of every file; the schema picks."""
    return {
        "set": row.set,
        "id": row.id,
        "completion_id": row.completion_id,
        "user_id": row.owner.user_id,
        "text": row.text,
        "messages": [{"role": role, "content": content} for role, content in row.messages],
        "use_case": row.use_case,
        "use_case_by": row.use_case_by,
        "language": row.language,
        "masked": row.masked,
        "source": row.owner.source,
        "split": row.split,
        "response": row.responses[0] if row.responses else "",
        "rater_id": row.rater_id,
        "responses": row.responses,
        "finished": row.finished,
        "ranks": row.ranks,
        "release_id": row.release_id,
        "annotations": [{"name": name, "value": value} for name, value in row.annotations],
    }
