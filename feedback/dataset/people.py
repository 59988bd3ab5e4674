"""Rules of whose rows they are: how many of one person, on which side, in which mixture."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from contracts.dataset import SetName, Split
from feedback.dataset.row import Given, Kept, Row
from feedback.dataset.settings import Group, RuleSettings


def capped_per_user(rows: Sequence[Row], given: Given) -> Kept:
    """The first prompts of each owner, counted over the three sets together."""
    prompts: dict[str, set[bytes]] = defaultdict(set)
    kept = []
    capped = set()
    for row in rows:
        mine = prompts[row.owner.user_id]
        if row.prompt.said in mine or len(mine) < given.settings.prompts_per_user:
            mine.add(row.prompt.said)
            kept.append(row)
        else:
            capped.add(row.owner.user_id)
    return kept, {"people_capped": len(capped)}


def split_by_user(rows: Sequence[Row], given: Given) -> Kept:
    """Each row to its person's split: the rater's for RM, the owner's else.

    A ranking of another person's prompt is dropped where the two are in different splits;
    imported prompts have no person behind them.
    """
    kept = []
    apart = 0
    for row in rows:
        split = split_of((row.rater or row.owner).user_id, given.settings)
        person = row.owner.source != "import"
        if person and split_of(row.owner.user_id, given.settings) != split:
            apart += 1
        else:
            kept.append(replace(row, split=split))
    return kept, {"owner_and_rater_apart": apart}


def split_of(user_id: str, settings: RuleSettings) -> Split:
    """A person's split: by hash alone, so that nobody changes sides as the data grows."""
    position = _position("instructloop split 1", user_id)
    if position < settings.train_fraction:
        return "train"
    if position < settings.train_fraction + settings.validation_fraction:
        return "validation"
    return "test"


def mixed(rows: Sequence[Row], given: Given) -> Kept:
    """Training rows of a set in the ratio that its mix asks for, as many as its groups have.

    Which ones stay is decided by a hash of their ids. A group that the mix names and nobody wrote
    anything in does not count.
    """
    out = set[tuple[str, str]]()
    for name, weights in given.settings.mix.items():
        out |= _surplus([r for r in rows if r.set == name and r.split == "train"], weights)
    kept = [row for row in rows if (row.set, row.id) not in out]
    groups = Counter(f"{row.set}_{group_of(row)}" for row in kept if row.split == "train")
    return kept, dict(sorted(groups.items()))


def group_of(row: Row) -> Group:
    groups: dict[str, Group] = {"labeler": "labeler", "import": "import"}
    return groups.get(row.owner.source, "customer")


def _surplus(rows: Sequence[Row], weights: Mapping[Group, float]) -> set[tuple[SetName, str]]:
    have = Counter(group_of(row) for row in rows)
    scale = min((have[group] / w for group, w in weights.items() if have[group]), default=0.0)
    wanted = {group: round(scale * weights.get(group, 0.0)) for group in have}
    out = set()
    for group, count in wanted.items():
        mine = [row for row in rows if group_of(row) == group]
        mine.sort(key=lambda row: _position("instructloop mix 1", row.id))
        out |= {(row.set, row.id) for row in mine[count:]}
    return out


def _position(what: str, id: str) -> float:
    """A number in [0, 1) that `id` alone decides."""
    digest = hashlib.sha256(f"{what}\0{id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
