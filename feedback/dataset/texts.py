"""The texts of rows that are kept, read from the log once more and masked, as Arrow tables."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from contracts.dataset import (
    INDEX,
    INDEX_COLUMNS,
    PPO_COLUMNS,
    RM_COLUMNS,
    SETS,
    SFT_COLUMNS,
    SetName,
)
from contracts.errors import LogUnavailable
from contracts.log import EventSource
from contracts.v1 import events_pb2 as pb
from feedback.dataset.engine import Engine
from feedback.dataset.row import Row
from feedback.dataset.segment import EVENTS, Segment, cut, records_of
from feedback.pii import mask

_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "masked": pa.list_(pa.string()),
    "annotations": pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())])),
    "responses": pa.list_(pa.string()),
    "finished": pa.list_(pa.bool_()),
    "releases": pa.list_(pa.string()),
    "ranks": pa.list_(pa.int32()),
}
_COLUMNS: dict[SetName, tuple[str, ...]] = {
    "sft": SFT_COLUMNS,
    "rm": RM_COLUMNS,
    "ppo": PPO_COLUMNS,
}
_TOPIC: dict[SetName, str] = {
    "sft": "demonstrations",
    "rm": "completions",
    "ppo": "completions",
}
_ROWS = 65_536

Pairs = tuple[tuple[str, str], ...]


class _Task(msgspec.Struct, frozen=True):
    """Rows whose texts stand in one segment, and annotations by row id."""

    rows: tuple[Row, ...]
    annotations: dict[str, Pairs]


def write(
    folder: Path, rows: Sequence[Row], engine: Engine, ends: Mapping[str, Mapping[int, int]]
) -> None:
    """Every set and the index of all rows, in the order of their ids."""
    said = _annotations(rows, engine, ends)
    tables: dict[SetName, list[pa.Table]] = {name: [] for name in SETS}
    for topic in ("demonstrations", "completions"):
        mine = [row for row in rows if _TOPIC[row.set] == topic]
        tasks = [
            (segment, _encoded(of, said))
            for segment, of in _by_segment(mine, topic, ends, [row.texts_at for row in mine])
        ]
        for made in engine.map(_tables, tasks):
            for name, value in made.items():
                tables[name].append(pa.ipc.open_stream(value).read_all())
    for name in SETS:
        _write_in_order(folder / f"{name}.parquet", _schema(_COLUMNS[name]), tables.pop(name))
    index = _columns(rows, {})
    schema = _schema(INDEX_COLUMNS)
    table = pa.Table.from_pydict({name: index[name] for name in INDEX_COLUMNS}, schema=schema)
    _write_in_order(folder / INDEX, schema, [table])


def _annotations(
    rows: Sequence[Row], engine: Engine, ends: Mapping[str, Mapping[int, int]]
) -> dict[str, Pairs]:
    """Row id to what the rater said beside the order, masked."""
    mine = [row for row in rows if row.annotated is not None]
    parts = _by_segment(mine, "rankings", ends, [row.at for row in mine])
    tasks = [(segment, _encoded(of, {})) for segment, of in parts]
    return {id: said for part in engine.map(_said, tasks) for id, said in part.items()}


def _encoded(rows: list[Row], said: Mapping[str, Pairs]) -> bytes:
    mine = {row.id: said[row.id] for row in rows if row.set == "rm" and row.id in said}
    return msgspec.msgpack.encode(_Task(tuple(rows), mine))


def _by_segment(
    rows: Sequence[Row],
    topic: str,
    ends: Mapping[str, Mapping[int, int]],
    places: Sequence[tuple[int, int]],
) -> Iterator[tuple[Segment, list[Row]]]:
    """Each segment that has some of the places, with the rows whose places they are."""
    by = {(s.partition, s.start): s for s in cut(topic, ends[topic])}
    found: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row, (partition, offset) in zip(rows, places, strict=True):
        found[partition, offset - offset % EVENTS].append(row)
    return ((by[place], found[place]) for place in sorted(found))


def _said(source: EventSource, task: tuple[Segment, bytes]) -> dict[str, Pairs]:
    segment, value = task
    rows = {row.at[1]: row for row in msgspec.msgpack.decode(value, type=_Task).rows}
    return {
        row.id: tuple(sorted((k, _shown(row, v)) for k, v in r.event.ranking.metadata.items()))
        for r in records_of(source, segment)
        if (row := rows.get(r.offset)) is not None
    }


def _tables(source: EventSource, task: tuple[Segment, bytes]) -> dict[SetName, bytes]:
    """Set to its rows of a segment, as an Arrow stream."""
    segment, value = task
    asked = msgspec.msgpack.decode(value, type=_Task)
    wanted = {row.texts_at[1] for row in asked.rows}
    events = {r.offset: r.event for r in records_of(source, segment) if r.offset in wanted}
    if gone := wanted - events.keys():
        raise LogUnavailable(
            f"{len(gone)} events of {segment.topic} were erased while the dataset was built;"
            " build it again"
        )
    made = {}
    for name in SETS:
        rows = [row for row in asked.rows if row.set == name]
        if rows:
            columns = _columns(rows, asked.annotations) | _texts(rows, events)
            made[name] = _stream(columns, _schema(_COLUMNS[name]))
    return made


def _texts(rows: Sequence[Row], events: Mapping[int, pb.Event]) -> dict[str, list[object]]:
    names = ("text", "messages", "response", "responses", "finished", "releases")
    columns: dict[str, list[object]] = {name: [] for name in names}
    for row in rows:
        event = events[row.texts_at[1]]
        body = event.demonstration if row.set == "sft" else event.completion
        prompt = body.prompt
        columns["text"].append(_shown(row, prompt.text))
        columns["messages"].append(
            [{"role": m.role, "content": _shown(row, m.content)} for m in prompt.messages]
        )
        outputs = [event.completion.outputs[i] for i in row.outputs]
        columns["response"].append(_shown(row, event.demonstration.response))
        columns["responses"].append([_shown(row, output.text) for output in outputs])
        columns["finished"].append([output.finish_reason == "stop" for output in outputs])
        released = event.completion.release_id
        columns["releases"].append([output.release_id or released for output in outputs])
    return columns


def _shown(row: Row, text: str) -> str:
    """As the dataset may hold it."""
    return mask(text).text if row.masked else text


def _columns(rows: Sequence[Row], annotations: Mapping[str, Pairs]) -> dict[str, list[object]]:
    """Every column that is no text of prompt or answer."""
    return {
        "set": [row.set for row in rows],
        "id": [row.id for row in rows],
        "completion_id": [row.completion_id for row in rows],
        "user_id": [row.owner.user_id for row in rows],
        "use_case": [row.use_case for row in rows],
        "use_case_by": [row.use_case_by for row in rows],
        "language": [row.prompt.language for row in rows],
        "masked": [row.masked for row in rows],
        "source": [row.owner.source for row in rows],
        "split": [row.split for row in rows],
        "rater_id": [row.rater_id for row in rows],
        "ranks": [row.ranks for row in rows],
        "release_id": [row.release_id for row in rows],
        "annotations": [
            [{"name": name, "value": value} for name, value in annotations.get(row.id, ())]
            for row in rows
        ],
    }


def _schema(columns: Iterable[str]) -> pa.Schema:
    return pa.schema([(column, _TYPES.get(column, pa.string())) for column in columns])


def _stream(columns: Mapping[str, list[object]], schema: pa.Schema) -> bytes:
    table = pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _write_in_order(path: Path, schema: pa.Schema, tables: Sequence[pa.Table]) -> None:
    """Sorted by id; a row group at a time, so that the texts are in memory once."""
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    keys = [(name, "ascending") for name in ("id", "set") if name in schema.names]
    order = pc.sort_indices(table, sort_keys=keys)
    with pq.ParquetWriter(path, schema, compression="zstd", version="2.6") as writer:
        for start in range(0, len(order), _ROWS):
            writer.write_table(table.take(order[start : start + _ROWS]), row_group_size=_ROWS)
