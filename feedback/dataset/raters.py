"""Rules against poisoning: whose rankings cannot be trusted, and how much one rater may weigh."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

from feedback.dataset.row import Given, Kept, Row

# (completion, better answer, worse answer); answers by their digest, as two raters may have ranked
# different ones.
Pair = tuple[str, bytes, bytes]


def known_answers_right(rows: Sequence[Row], given: Given) -> Kept:
    """Raters who order known answers as they are known; the checks themselves are no data.

    A tie is half right. Fewer than three known pairs say nothing about a rater.
    """
    right: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for better, worse in row.known:
            gap = row.ranks[worse] - row.ranks[better]
            right[row.rater_id].append(0.5 if gap == 0 else float(gap > 0))
    least = given.settings.min_known_answers_right
    out = {rater for rater, hits in right.items() if len(hits) >= 3 and _mean(hits) < least}
    kept = [row for row in rows if not row.known and (not row.rater or row.rater_id not in out)]
    return kept, {"raters_left_out": len(out), "checks": sum(bool(row.known) for row in rows)}


def ranked_apart(rows: Sequence[Row], _given: Given) -> Kept:
    """A rater's first ranking of the same answers to the same prompt, however often it was asked:
    one person's word for one thing counts once.
    """
    seen: set[object] = set()
    kept = []
    for row in rows:
        if row.set == "rm":
            answers = frozenset(words.digest for words in row.responses)
            said = row.rater_id, row.prompt.said, answers
            if said in seen:
                continue
            seen.add(said)
        kept.append(row)
    return kept, {}


def agreeing(rows: Sequence[Row], given: Given) -> Kept:
    """Raters who order pairs as most others do who ranked the same completion."""
    votes: Counter[Pair] = Counter(pair for row in rows for pair in _pairs(row))
    agreed: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for completion, better, worse in _pairs(row):
            same = votes[completion, better, worse] - 1
            other = votes[completion, worse, better]
            if same != other:
                agreed[row.rater_id].append(float(same > other))
    settings = given.settings
    out = {
        rater
        for rater, hits in agreed.items()
        if len(hits) >= settings.min_rater_pairs and _mean(hits) < settings.min_rater_agreement
    }
    kept = [row for row in rows if row.rater is None or row.rater_id not in out]
    return kept, {"raters_left_out": len(out), "raters_compared": len(agreed)}


def bounded_weight(rows: Sequence[Row], given: Given) -> Kept:
    """No rater has more than a share of the training rankings; a rater's first ones stay."""
    share = given.settings.max_rater_share
    counts = Counter(row.rater_id for row in rows if row.set == "rm" and row.split == "train")
    bound = _bound(list(counts.values()), share)
    kept, taken = list[Row](), Counter[str]()
    for row in rows:
        if row.set == "rm" and row.split == "train":
            taken[row.rater_id] += 1
            if taken[row.rater_id] > bound:
                continue
        kept.append(row)
    return kept, {"raters_bounded": sum(count > bound for count in counts.values())}


def _bound(counts: Sequence[int], share: float) -> int:
    """The largest number of rankings a rater may keep so that nobody has more than `share` of all
    that are kept; one at least, as fewer raters than 1 / share cannot reach it.
    """
    low, high = 1, max(counts, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if middle <= share * sum(min(count, middle) for count in counts):
            low = middle
        else:
            high = middle - 1
    return low


def _pairs(row: Row) -> Iterator[Pair]:
    """Ordered pairs of one ranking; ties say nothing."""
    if row.set != "rm":
        return
    for i, j in combinations(range(len(row.ranks)), 2):
        if row.ranks[i] != row.ranks[j]:
            better, worse = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
            better_, worse_ = row.responses[better], row.responses[worse]
            yield row.completion_id, better_.digest, worse_.digest


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
