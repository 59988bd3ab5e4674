"""Outlines of events to rows of the three sets: a ranking meets its completion."""

from collections.abc import Iterable, Iterator, Mapping

from contracts.dataset import RuleCount, SetName
from feedback.dataset.outline import Prompted, Ranked
from feedback.dataset.row import Row
from feedback.dataset.rules import rows_per_set

# Prompts for PPO are what people asked; a labeler's own are for SFT and RM (InstructGPT, table 6).
_PPO_SOURCES = ("playground", "api", "import")

# Outlines with the partition that each stands in.
Completions = dict[str, tuple[int, Prompted]]


def sft_row(partition: int, shown: Prompted) -> Row:
    place = (partition, shown.offset)
    return Row(
        set="sft",
        id=shown.id,
        owner=shown.owner,
        prompt=shown.prompt,
        use_case=shown.use_case,
        responses=shown.answers,
        at=place,
        texts_at=place,
    )


def ppo_row(partition: int, asked: Prompted) -> Iterator[Row]:
    if asked.owner.source in _PPO_SOURCES:
        place = (partition, asked.offset)
        yield Row(
            set="ppo",
            id=asked.id,
            owner=asked.owner,
            prompt=asked.prompt,
            use_case=asked.use_case,
            completion_id=asked.completion_id,
            at=place,
            texts_at=place,
        )


def rm_row(partition: int, ranked: Ranked, completions: Completions) -> Iterator[Row]:
    """The ranked outputs in the completion's order; nothing where one of them does not exist."""
    found = completions.get(ranked.completion_id)
    if found is None or ranked.outputs[-1] >= len(found[1].answers):
        return
    there, asked = found
    yield Row(
        set="rm",
        id=ranked.id,
        owner=asked.owner,
        prompt=asked.prompt,
        use_case=asked.use_case,
        responses=tuple(asked.answers[i] for i in ranked.outputs),
        outputs=ranked.outputs,
        ranks=ranked.ranks,
        rater=ranked.rater,
        annotated=ranked.annotated,
        known=_known_answers(asked.known, ranked.outputs) if asked.known else (),
        completion_id=asked.completion_id,
        release_id=asked.release_id,
        at=(partition, ranked.offset),
        texts_at=(there, asked.offset),
    )


def known_completions(
    completed: Iterable[tuple[int, Prompted]], withdrawn: set[tuple[str, str]]
) -> Completions:
    """By public id, the first of each. What its owner, (user, id), took back is unknown from here
    on, and so is every ranking of it.
    """
    known: Completions = {}
    for place in completed:
        known.setdefault(place[1].completion_id, place)
    for user, id in withdrawn:
        if id in known and known[id][1].owner.user_id == user:
            del known[id]
    return known


def joined(
    completions: Completions,
    demonstrations: Iterable[tuple[int, Prompted]],
    rankings: list[tuple[int, Ranked]],
    notes: Mapping[str, int],
) -> tuple[list[Row], RuleCount]:
    """Every event as rows; and how many rankings name a completion and outputs that exist."""
    rows = [sft_row(*place) for place in demonstrations]
    rows += (row for place in rankings for row in rm_row(*place, completions))
    rows += (row for place in completions.values() for row in ppo_row(*place))
    rows_out: dict[SetName, int] = rows_per_set(rows)
    return rows, RuleCount(
        rule="completion_known",
        version=2,
        rows_in=rows_out | {"rm": len(rankings)},
        rows_out=rows_out,
        settings={},
        notes=dict(notes),
    )


def _known_answers(said: str, ranked: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(better, worse) as positions in `ranked`; what names other outputs is left out."""
    at = {str(output): position for position, output in enumerate(ranked)}
    pairs = [pair.strip().split(">") for pair in said.split(",") if pair.count(">") == 1]
    return tuple((at[a], at[b]) for a, b in pairs if a in at and b in at)
