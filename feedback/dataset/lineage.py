"""From a person, a completion or a release to the rows and models that used it, and back."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from contracts.dataset import INDEX, MANIFEST, SETS, DatasetManifest
from contracts.errors import NotFound
from contracts.release import Release, ReleaseRegistry


@dataclass(frozen=True)
class Use:
    """A dataset in which something is, and what was made of it."""

    dataset: str
    # Its texts were deleted since somebody in it erased theirs.
    texts_erased: bool
    rows: int
    reward_models: tuple[str, ...]
    # Trained on the dataset, and trained on from such a release.
    releases: tuple[str, ...]
    inherited_by: tuple[str, ...]


def manifest_of(registry: ReleaseRegistry, digest: str) -> DatasetManifest:
    """Raises NotFound for what is no dataset of the registry."""
    try:
        content = (registry.artifacts.path(digest) / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"artifact {digest} is not a dataset") from None
    return DatasetManifest.model_validate_json(content)


def uses_of_person(registry: ReleaseRegistry, user_id: str) -> list[Use]:
    """Every dataset that holds rows of the person, as owner or as rater."""
    return [
        _use(registry, digest, rows)
        for digest in registry.artifacts.kept(MANIFEST)
        if (rows := manifest_of(registry, digest).people.get(user_id, 0))
    ]


def explain(registry: ReleaseRegistry, id: str) -> dict[str, Any]:
    """What an id stands for: of a completion or an event, the rows and all that used them; of a
    release, its dataset with the rows that it was trained on. Raises NotFound.
    """
    if any(release.id == id for release in registry.all()):
        return _explain_release(registry, registry.get(id))
    found = [
        (_use(registry, digest, len(rows)), rows)
        for digest in registry.artifacts.kept(INDEX)
        if (rows := list(_rows(registry, digest, id)))
    ]
    if not found:
        raise NotFound(f"no dataset in {registry.root} has a row of {id!r}; build one first")
    return {
        "id": id,
        "datasets": [{**asdict(use), "rows": rows} for use, rows in found],
        "served": served_by(registry, [use for use, _ in found]),
    }


def diff(registry: ReleaseRegistry, before: str, after: str) -> dict[str, Any]:
    """What differs between two datasets' manifests, as {"path": [before, after]}, and the ids of
    rows that only one of them has. Raises NotFound.
    """
    a, b = (
        _flat(manifest_of(registry, digest).model_dump(mode="json")) for digest in (before, after)
    )
    rows = [
        {(row["set"], row["id"]) for row in _rows(registry, digest, None)}
        for digest in (before, after)
    ]
    return {
        "changed": {
            k: [a.get(k), b.get(k)] for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
        },
        "rows_removed": sorted(" ".join(row) for row in rows[0] - rows[1]),
        "rows_added": sorted(" ".join(row) for row in rows[1] - rows[0]),
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their path; rules go by their name."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "rule" in value[0]:
        value = {rule["rule"]: {k: v for k, v in rule.items() if k != "rule"} for rule in value}
    if not isinstance(value, dict):
        return {path: value}
    return {
        k: v
        for name, of in value.items()
        for k, v in _flat(of, f"{path}.{name}".strip(".")).items()
    }


def served_by(registry: ReleaseRegistry, uses: Iterable[Use]) -> str | None:
    """The current release, where it was trained on one of these or comes from one that was."""
    current = registry.current_id()
    used = {r for use in uses for r in (*use.releases, *use.inherited_by)}
    return current if current in used else None


def erase_texts(registry: ReleaseRegistry, user_id: str) -> list[str]:
    """Delete the texts of every dataset that holds rows of the person; the manifest and the index
    of rows stay. Returns the datasets' digests.
    """
    digests = [use.dataset for use in uses_of_person(registry, user_id)]
    for digest in digests:
        registry.artifacts.forget(digest, [f"{name}.parquet" for name in SETS])
    return digests


def _explain_release(registry: ReleaseRegistry, release: Release) -> dict[str, Any]:
    line = [release]
    while line[-1].parent is not None:
        line.append(registry.get(line[-1].parent))
    return {
        "id": release.id,
        "policy": release.artifact,
        "reward_model": release.reward_model,
        "code_version": release.code_version,
        "evaluation": release.evaluation,
        "served": registry.current_id() == release.id,
        "trained_on": [
            {"release": r.id, "dataset": r.dataset, "rows": list(_rows(registry, r.dataset, None))}
            for r in line
            if r.dataset is not None
        ],
    }


def _rows(registry: ReleaseRegistry, digest: str, id: str | None) -> Iterator[dict[str, str]]:
    """Rows of a dataset's index, all or those of an event or completion; no texts."""
    file = registry.artifacts.path(digest) / INDEX
    if not file.exists():  # built before there was an index
        return
    table = pq.read_table(file)
    if id is not None:
        matches = pc.or_(pc.equal(table["id"], id), pc.equal(table["completion_id"], id))
        table = table.filter(matches)
    yield from table.to_pylist()


def _use(registry: ReleaseRegistry, digest: str, rows: int) -> Use:
    releases = registry.all()
    direct = [r for r in releases if r.dataset == digest]
    ids = {r.id for r in direct}
    inherited = list[str]()
    grew = True
    while grew:
        more = [r.id for r in releases if r.parent in ids and r.id not in ids]
        inherited += more
        ids |= set(more)
        grew = bool(more)
    return Use(
        dataset=digest,
        texts_erased=bool(registry.artifacts.forgotten(digest)),
        rows=rows,
        reward_models=tuple(sorted({r.reward_model for r in direct if r.reward_model})),
        releases=tuple(r.id for r in direct),
        inherited_by=tuple(inherited),
    )
