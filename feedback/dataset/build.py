"""Events to examples and manifest: the log up to now, through the rules, into Parquet files."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contracts.artifact import ArtifactStore
from contracts.dataset import MANIFEST, SETS, SPLITS, DatasetManifest, RuleCount, SetName, Split
from contracts.log import EventSource, end_offsets, follow
from feedback.consent import fold
from feedback.dataset import texts
from feedback.dataset.engine import Engine, Here
from feedback.dataset.join import joined, known_completions
from feedback.dataset.row import Given, Prompt, Row, Words
from feedback.dataset.rules import apply_rules
from feedback.dataset.segment import Outlines
from feedback.dataset.settings import RuleSettings

# In the order in which their ends are read: a ranking comes after its completion, and the
# consents last, so that no withdrawal made before the build is missed.
_READ = ("rankings", "completions", "demonstrations", "withdrawals", "consents")

Ends = Mapping[str, Mapping[int, int]]


def build_dataset(
    source: EventSource,
    store: ArtifactStore,
    rules: RuleSettings,
    code_version: str,
    *,
    decisions: Mapping[str, bool] | None = None,
    until: Ends | None = None,
    engine: Engine | None = None,
    outlines: Outlines | None = None,
) -> str:
    """Build the dataset of the events so far, or `until` given ends; its digest in `store`.

    The same events, rules, decisions of reviewers and code give the same digest on any machine,
    with any engine, and whatever `outlines` kept. An event that cannot be read any more, because
    its person erased it, is not there.
    """
    engine, outlines = engine or Here(source), outlines or Outlines()
    ends = end_offsets(source, _READ) if until is None else until
    rows, known = _rows(source, ends, engine, outlines, rules, code_version)
    consents = fold(follow(source, "consents", {}, dict(ends["consents"])))
    kept, counts = apply_rules(rows, Given(rules, consents, decisions or {}))
    del rows
    manifest = DatasetManifest(
        events={t: {p: (0, end) for p, end in of.items()} for t, of in sorted(ends.items())},
        rules=(known, *counts),
        rows=_rows_per_split(kept),
        people=_rows_per_person(kept),
        use_cases={name: _use_cases(kept, name) for name in SETS},
        lengths={name: _lengths(kept, name, rules.mask_pii) for name in SETS},
        code_version=code_version,
    )
    with tempfile.TemporaryDirectory() as folder:
        texts.write(Path(folder), kept, engine, ends)
        (Path(folder) / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        return store.put("dataset", Path(folder))


def _rows(
    source: EventSource,
    ends: Ends,
    engine: Engine,
    outlines: Outlines,
    rules: RuleSettings,
    code_version: str,
) -> tuple[list[Row], RuleCount]:
    """Every event as rows; and how many rankings name a completion and outputs that exist."""

    def read(topic: str) -> list[tuple[int, Any]]:
        chars = rules.common_prefix_chars
        segments = outlines.read(source, engine, topic, ends[topic], chars, code_version)
        return [(partition, outline) for partition, of in segments for outline in of]

    found = {topic: read(topic) for topic in ("completions", "demonstrations", "rankings")}
    withdrawn = {
        (record.event.user_id, record.event.withdrawal.completion_id)
        for record in follow(source, "withdrawals", {}, dict(ends["withdrawals"]))
    }
    not_read = {f"{t}_not_readable": sum(ends[t].values()) - len(of) for t, of in found.items()}
    return joined(
        known_completions(found["completions"], withdrawn),
        found["demonstrations"],
        found["rankings"],
        {"withdrawn": len(withdrawn), **not_read},
    )


def _rows_per_split(rows: Sequence[Row]) -> dict[SetName, dict[Split, int]]:
    counts = Counter((row.set, row.split) for row in rows)
    return {name: {split: counts[name, split] for split in SPLITS} for name in SETS}


def _rows_per_person(rows: Iterable[Row]) -> dict[str, int]:
    counts = Counter(user_id for row in rows for user_id in {s.user_id for s in row.people})
    return dict(sorted(counts.items()))


def _use_cases(rows: Sequence[Row], name: SetName) -> dict[str, int]:
    return dict(sorted(Counter(row.use_case for row in rows if row.set == name).items()))


def _lengths(rows: Sequence[Row], name: SetName, masked: bool) -> dict[str, dict[str, int]]:
    """In characters, of texts as they are in the dataset."""
    mine = [row for row in rows if row.set == name]
    lengths: dict[str, list[Prompt | Words]] = {
        "prompt": [row.prompt for row in mine],
        "response": [words for row in mine for words in row.responses],
    }
    return {
        what: _spread(sorted(words.masked_chars if masked else words.chars for words in of))
        for what, of in lengths.items()
        if of
    }


def _spread(ordered: Sequence[int]) -> dict[str, int]:
    at = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}
