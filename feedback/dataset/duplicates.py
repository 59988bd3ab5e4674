"""Rules of what was said before: equal, nearly equal, with the same beginning."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from contracts.dataset import SETS, SetName
from feedback.dataset.row import Given, Kept, Row
from feedback.dataset.sketch import PERMUTATIONS, repeats


def said_once(rows: Sequence[Row], _given: Given) -> Kept:
    """Once: a prompt in PPO, a prompt with its answer in SFT, a rater's last ranking in RM."""
    chosen: dict[object, Row] = {}
    for row in rows:
        key = _identity(row)
        if key not in chosen or (row.set == "rm" and row.at > chosen[key].at):
            chosen[key] = row
    ids = {(row.set, row.id) for row in chosen.values()}
    return [row for row in rows if (row.set, row.id) in ids], {}


def _identity(row: Row) -> object:
    if row.set == "rm":
        return "rm", row.rater_id, row.completion_id
    return row.set, row.prompt.said, tuple(words.digest for words in row.responses)


def near_once(rows: Sequence[Row], given: Given) -> Kept:
    """Of a set's prompts, none that is nearly the same as an earlier one; all rows of it go.

    MinHash over character shingles (Broder 1997), by the settings' similarity.
    """
    least = given.settings.near_duplicate_similarity
    if least == 1:
        return list(rows), {}
    out: dict[SetName, set[bytes]] = {name: _near(rows, name, least) for name in SETS}
    kept = [row for row in rows if row.prompt.words not in out[row.set]]
    return kept, {"prompts_dropped": sum(map(len, out.values()))}


def _near(rows: Sequence[Row], name: SetName, least: float) -> set[bytes]:
    """Digests of the set's prompts that are nearly the same as an earlier one."""
    sketch_of = dict[bytes, bytes]()
    for row in rows:
        if row.set == name:
            sketch_of.setdefault(row.prompt.words, row.prompt.sketch)
    found = np.frombuffer(b"".join(sketch_of.values()), dtype=np.uint8)
    late = repeats(found.reshape(-1, PERMUTATIONS), least)
    return {words for words, again in zip(sketch_of, late.tolist(), strict=True) if again}


def prefix_once(rows: Sequence[Row], _given: Given) -> Kept:
    """Of a set's prompts that begin with the same characters, only the first; all its rows stay.

    Sharing a prefix of n characters is being equal in the first n: a look-up finds a cluster.
    """
    first: dict[tuple[SetName, bytes], bytes] = {}
    clusters: dict[tuple[SetName, bytes], set[bytes]] = defaultdict(set)
    kept = []
    for row in rows:
        if not row.prompt.beginning:
            kept.append(row)
            continue
        key = row.set, row.prompt.beginning
        if first.setdefault(key, row.prompt.words) == row.prompt.words:
            kept.append(row)
        else:
            clusters[key].add(row.prompt.words)
    dropped = sum(len(words) for words in clusters.values())
    return kept, {"clusters": len(clusters), "prompts_dropped": dropped}
