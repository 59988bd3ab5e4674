"""Which events count: the rules in their order, each with a version and what it let through."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from contracts.dataset import SETS, RuleCount, SetName
from feedback import pii
from feedback.dataset import admission, content, duplicates, people, raters
from feedback.dataset.row import Given, Keep, Row
from feedback.dataset.settings import RuleSettings


@dataclass(frozen=True)
class Rule:
    """A named step; a change of what it lets through is a new version."""

    name: str
    version: int
    keep: Keep
    # Names of the settings that it reads.
    settings: tuple[str, ...] = ()


RULES = (
    Rule("consented", 2, admission.consented),
    Rule("from_sources", 1, admission.from_sources, ("sources",)),
    Rule("language_recorded", 1, content.language_recorded),
    Rule("short_enough", 1, content.short_enough, ("max_prompt_chars", "max_response_chars")),
    Rule("said_once", 1, duplicates.said_once),
    Rule("near_once", 2, duplicates.near_once, ("near_duplicate_similarity",)),
    Rule("prefix_once", 1, duplicates.prefix_once, ("common_prefix_chars",)),
    Rule("capped_per_user", 1, people.capped_per_user, ("prompts_per_user",)),
    Rule("use_case_known", 1, content.use_case_known, ("classify_use_case",)),
    Rule("masked", pii.VERSION, content.masked, ("mask_pii",)),
    Rule("reviewed", 1, admission.reviewed, ("review",)),
    Rule("known_answers_right", 1, raters.known_answers_right, ("min_known_answers_right",)),
    Rule("ranked_apart", 1, raters.ranked_apart),
    Rule("agreeing", 1, raters.agreeing, ("min_rater_agreement", "min_rater_pairs")),
    Rule("split_by_user", 1, people.split_by_user, ("train_fraction", "validation_fraction")),
    Rule("permitted", 1, admission.permitted),
    Rule("bounded_weight", 1, raters.bounded_weight, ("max_rater_share",)),
    Rule("mixed", 1, people.mixed, ("mix",)),
)


def apply_rules(rows: Iterable[Row], given: Given) -> tuple[list[Row], list[RuleCount]]:
    """Every rule in order, over rows sorted by id, so that their own order does not matter."""
    kept, counts = sorted(rows, key=lambda row: (row.id, row.set)), []
    for rule in RULES:
        before = rows_per_set(kept)
        kept, notes = rule.keep(kept, given)
        counts.append(
            RuleCount(
                rule=rule.name,
                version=rule.version,
                rows_in=before,
                rows_out=rows_per_set(kept),
                settings={name: _said(given.settings, name) for name in rule.settings},
                notes=notes,
            )
        )
    return kept, counts


def rows_per_set(rows: Iterable[Row]) -> dict[SetName, int]:
    counts = Counter(map(attrgetter("set"), rows))
    return {name: counts[name] for name in SETS}


def _said(settings: RuleSettings, name: str) -> bool | str | int | float:
    """A setting as the manifest holds it: a table or list as JSON."""
    value = getattr(settings, name)
    return value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
