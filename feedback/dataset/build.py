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
from feedback.dataset.rules import Row, RuleSettings, Share, apply_rules, rows_per_set

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

_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
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
    source: EventSource, store: ArtifactStore, rules: RuleSettings, code_version: str
) -> str:
    """Build the dataset of every event so far and return its digest in `store`.

    The same events and the same rules give the same digest.
    """
    ends = end_offsets(source, _READ)
    consents = fold(follow(source, "consents", {}, ends["consents"]))
    rows, known = _rows(source, ends)
    kept, counts = apply_rules(rows, rules, consents)
    manifest = DatasetManifest(
        events={t: {p: (0, end) for p, end in of.items()} for t, of in sorted(ends.items())},
        rules=(known, *counts),
        rows=_rows_per_split(kept),
        people=_rows_per_person(kept),
        code_version=code_version,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS:
            _write(
                Path(folder) / f"{name}.parquet",
                name,
                [r for r in kept if r.set == name],
            )
        (Path(folder) / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        return store.put("dataset", Path(folder))


def _rows(source: EventSource, ends: Ends) -> tuple[list[Row], RuleCount]:
    """Every event as rows; and how many rankings name a completion and outputs that exist."""
    completions: dict[str, pb.Event] = {}
    for record in _follow(source, "completions", ends):
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
    known = RuleCount(
        rule="completion_known",
        version=2,
        rows_in=rows_out | {"rm": len(rankings)},
        rows_out=rows_out,
        settings={},
        notes={"withdrawn": len(withdrawn)},
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
        completion_id=body.completion_id,
        release_id=completed.completion.release_id,
        offset=record.offset,
    )


def _rows_per_split(rows: Sequence[Row]) -> dict[SetName, dict[Split, int]]:
    counts = Counter((row.set, row.split) for row in rows)
    return {name: {split: counts[name, split] for split in SPLITS} for name in SETS}


def _rows_per_person(rows: Iterable[Row]) -> dict[str, int]:
    counts = Counter(user_id for row in rows for user_id in {s.user_id for s in row.people})
    return dict(sorted(counts.items()))


def _write(path: Path, name: SetName, rows: Sequence[Row]) -> None:
    schema = pa.schema([(column, _TYPES.get(column, pa.string())) for column in _COLUMNS[name]])
    table = pa.Table.from_pylist([_cells(row) for row in rows], schema=schema)
    pq.write_table(table, path, compression="zstd", version="2.6", row_group_size=65_536)


def _cells(row: Row) -> dict[str, object]:
    """Every column of every set; the schema picks."""
    return {
        "id": row.id,
        "user_id": row.owner.user_id,
        "text": row.text,
        "messages": [{"role": role, "content": content} for role, content in row.messages],
        "use_case": row.use_case,
        "source": row.owner.source,
        "split": row.split,
        "response": row.responses[0] if row.responses else "",
        "rater_id": row.rater.user_id if row.rater else "",
        "responses": row.responses,
        "finished": row.finished,
        "ranks": row.ranks,
        "release_id": row.release_id,
    }
