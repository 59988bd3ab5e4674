"""Rules of who and what is let in: consent and notice, purpose, source, review."""

from collections.abc import Sequence

from feedback.consent import UNKNOWN, ConsentState
from feedback.dataset.row import Given, Kept, Row, Share

LICENCE = "licence:"


def consented(rows: Sequence[Row], given: Given) -> Kept:
    """Everyone in the row agrees to training or evaluation and took nothing back; an import is
    admitted by its licence.
    """

    def admitted(share: Share) -> bool:
        state = given.consents.get(share.user_id, UNKNOWN)
        return _agrees(share, state, "training") or _agrees(share, state, "evaluation")

    kept = [row for row in rows if all(admitted(share) for share in row.people)]
    left_out = {s.user_id for row in rows for s in row.people if not admitted(s)}
    return kept, {"people_left_out": len(left_out)}


def permitted(rows: Sequence[Row], given: Given) -> Kept:
    """Everyone agrees to the purpose of the row's split: evaluation for test, else training."""

    def admitted(row: Row, share: Share) -> bool:
        purpose = "evaluation" if row.split == "test" else "training"
        return _agrees(share, given.consents.get(share.user_id, UNKNOWN), purpose)

    kept = [row for row in rows if all(admitted(row, share) for share in row.people)]
    return kept, {}


def from_sources(rows: Sequence[Row], given: Given) -> Kept:
    """The prompt comes from one of the sources that are wanted."""
    kept = [row for row in rows if row.owner.source in given.settings.sources]
    counts = {f"from_{source}": 0 for source in sorted({row.owner.source for row in kept})}
    for row in kept:
        counts[f"from_{row.owner.source}"] += 1
    return kept, counts


def reviewed(rows: Sequence[Row], given: Given) -> Kept:
    """What a reviewer dropped is out, and what must be reviewed but may not be read."""
    unreadable = [
        row for row in rows if to_review(row, given.settings.review) and not _read(row, given)
    ]
    hidden = {(row.set, row.id) for row in unreadable}
    kept = [
        row for row in rows if given.decisions.get(row.id, True) and (row.set, row.id) not in hidden
    ]
    return kept, {"not_to_be_read": len(hidden), "dropped": len(rows) - len(kept) - len(hidden)}


def to_review(row: Row, wanted: str) -> bool:
    return wanted == "all" or (wanted == "masked" and bool(row.masked))


def _read(row: Row, given: Given) -> bool:
    return all(
        _agrees(share, given.consents.get(share.user_id, UNKNOWN), "reading")
        for share in row.people
    )


def _agrees(share: Share, state: ConsentState, purpose: str) -> bool:
    standing = getattr(state, purpose)
    if share.source == "import":
        return share.notice.startswith(LICENCE) and not standing.took_back(share.at)
    return not share.notice.startswith(LICENCE) and bool(standing.allows(share.at))
