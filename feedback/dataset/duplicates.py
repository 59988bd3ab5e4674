"""Rules of what was said before: equal, nearly equal, with the same beginning."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from contracts.dataset import SetName
from feedback.dataset.row import Given, Kept, Row

_SHINGLE = 5
_PERMUTATIONS = 128


def said_once(rows: Sequence[Row], _given: Given) -> Kept:
    """Once: a prompt in PPO, a prompt with its answer in SFT, a rater's last ranking in RM."""
    chosen: dict[object, Row] = {}
    for row in rows:
        key = _identity(row)
        if key not in chosen or (row.set == "rm" and row.offset > chosen[key].offset):
            chosen[key] = row
    ids = {(row.set, row.id) for row in chosen.values()}
    return [row for row in rows if (row.set, row.id) in ids], {}


def _identity(row: Row) -> object:
    if row.set == "rm":
        return "rm", row.rater_id, row.completion_id
    return row.set, row.prompt, row.responses


def near_once(rows: Sequence[Row], given: Given) -> Kept:
    """Of a set's prompts that are nearly the same, only the first; all rows of it stay.

    MinHash over character shingles, looked up in bands and then compared, so that the settings'
    similarity is what decides (Broder 1997).
    """
    least = given.settings.near_duplicate_similarity
    if least == 1:
        return list(rows), {}
    kept, dropped = list[Row](), 0
    alike: dict[SetName, dict[str, bool]] = {}
    for row in rows:
        if row.set not in alike:
            alike[row.set] = _first_of_their_kind(
                (r.words for r in rows if r.set == row.set), least
            )
        if alike[row.set][row.words]:
            kept.append(row)
    dropped = sum(not first for of in alike.values() for first in of.values())
    return kept, {"prompts_dropped": dropped}


def _first_of_their_kind(texts: Iterable[str], least: float) -> dict[str, bool]:
    """Text to whether no earlier one that was kept is at least as similar as `least`."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=least, num_perm=_PERMUTATIONS, num_bands=_bands(least))
    kept = list[RMinHash]()
    first: dict[str, bool] = {}
    for text in texts:
        if text in first:
            continue
        words = " ".join(text.split()).lower()
        sketch = RMinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update([words[i : i + _SHINGLE] for i in range(max(1, len(words) - _SHINGLE + 1))])
        first[text] = not any(sketch.jaccard(kept[i]) >= least for i in index.query(sketch))
        if first[text]:
            index.insert(len(kept), sketch)
            kept.append(sketch)
    return first


def _bands(least: float) -> int:
    """Bands of as many rows that two texts of this similarity meet in one with near certainty."""
    for rows in (16, 8, 4, 2):
        bands = _PERMUTATIONS // rows
        if (1 - least**rows) ** bands < 0.01:
            return bands
    return _PERMUTATIONS


def prefix_once(rows: Sequence[Row], given: Given) -> Kept:
    """Of a set's prompts that begin with the same characters, only the first; all its rows stay.

    Sharing a prefix of n characters is being equal in the first n: a look-up finds a cluster.
    """
    length = given.settings.common_prefix_chars
    first: dict[tuple[SetName, str], str] = {}
    clusters: dict[tuple[SetName, str], set[str]] = defaultdict(set)
    kept = []
    for row in rows:
        if len(row.words) < length:
            kept.append(row)
            continue
        key = row.set, row.words[:length]
        if first.setdefault(key, row.words) == row.words:
            kept.append(row)
        else:
            clusters[key].add(row.words)
    dropped = sum(len(words) for words in clusters.values())
    return kept, {"clusters": len(clusters), "prompts_dropped": dropped}
