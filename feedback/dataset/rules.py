"""Which events count: pure rules over rows, each with a version and what it let through."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contracts.dataset import SETS, RuleCount, SetName, Split
from feedback.consent import UNKNOWN, ConsentState

LICENCE = "licence:"


class RuleSettings(BaseModel):
    """Everything that the rules may be told.

    Lengths are in characters: feedback has no tokenizer, so the trainer drops again, by tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # InstructGPT, appendix C: prompts over 1k tokens are dropped, answers are at most 1k;
    # 4 characters a token.
    max_prompt_chars: int = Field(default=4000, ge=1)
    max_response_chars: int = Field(default=4000, ge=1)
    # InstructGPT, section 3.2, drops prompts with "a long common prefix" without a number;
    # ours: two sentences.
    common_prefix_chars: int = Field(default=200, ge=1)
    # InstructGPT, section 3.2.
    prompts_per_user: int = Field(default=200, ge=1)
    # InstructGPT, section 3.2, splits by user id without a ratio; ours: the usual 80 / 10 / 10,
    # where test is the rest.
    train_fraction: float = Field(default=0.8, ge=0, le=1)
    validation_fraction: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _fractions_fit(self) -> "RuleSettings":
        if self.train_fraction + self.validation_fraction > 1:
            raise ValueError(
                "train_fraction + validation_fraction: expected at most 1, got "
                f"{self.train_fraction + self.validation_fraction}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Share:
    """What one person put into a row: the prompt's owner, or the rater."""

    user_id: str
    source: str
    notice: str
    # Event time in seconds since 1970.
    at: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one set on its way through the rules."""

    set: SetName
    # Id of the event that the row comes from; of the ranking for the reward model.
    id: str
    owner: Share
    # As in contracts.v1: raw text, or (role, content) pairs, never both.
    text: str
    messages: tuple[tuple[str, str], ...]
    # contracts.events.prompt_text: the words, whichever form the prompt has.
    words: str
    use_case: str = ""
    # SFT: the one answer; RM: the K answers.
    responses: tuple[str, ...] = ()
    # RM only, aligned with responses.
    finished: tuple[bool, ...] = ()
    ranks: tuple[int, ...] = ()
    rater: Share | None = None
    completion_id: str = ""
    release_id: str = ""
    # Offset of the event: one rater's events are in one partition, so it orders them.
    offset: int = 0
    split: Split = "train"

    @property
    def people(self) -> tuple[Share, ...]:
        return (self.owner,) if self.rater is None else (self.owner, self.rater)

    @property
    def prompt(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        return self.text, self.messages


Notes = dict[str, int]
Consents = Mapping[str, ConsentState]
Kept = tuple[list[Row], Notes]


@dataclass(frozen=True)
class Rule:
    """A named step; a change of what it lets through is a new version."""

    name: str
    version: int
    # Names of the settings that it reads.
    settings: tuple[str, ...]
    keep: Callable[[Sequence[Row], RuleSettings, Consents], Kept]


def apply_rules(
    rows: Iterable[Row], settings: RuleSettings, consents: Consents
) -> tuple[list[Row], list[RuleCount]]:
    """Every rule in order, over rows sorted by id, so that their own order does not matter."""
    kept, counts = sorted(rows, key=lambda row: (row.id, row.set)), []
    for rule in RULES:
        before = rows_per_set(kept)
        kept, notes = rule.keep(kept, settings, consents)
        counts.append(
            RuleCount(
                rule=rule.name,
                version=rule.version,
                rows_in=before,
                rows_out=rows_per_set(kept),
                settings={name: getattr(settings, name) for name in rule.settings},
                notes=notes,
            )
        )
    return kept, counts


def rows_per_set(rows: Iterable[Row]) -> dict[SetName, int]:
    counts: dict[SetName, int] = dict.fromkeys(SETS, 0)
    for row in rows:
        counts[row.set] += 1
    return counts


def consented(rows: Sequence[Row], _settings: RuleSettings, consents: Consents) -> Kept:
    """Everyone in the row agrees and took nothing back; an import is admitted by its licence."""

    def admitted(share: Share) -> bool:
        state = consents.get(share.user_id, UNKNOWN)
        if share.source == "import":
            return share.notice.startswith(LICENCE) and not state.took_back(share.at)
        return not share.notice.startswith(LICENCE) and state.allows(share.at)

    kept = [row for row in rows if all(admitted(share) for share in row.people)]
    left_out = {s.user_id for row in rows for s in row.people if not admitted(s)}
    return kept, {"people_left_out": len(left_out)}


def short_enough(rows: Sequence[Row], settings: RuleSettings, _consents: Consents) -> Kept:
    """Prompt and answers are short enough; a ranking with one answer too long goes as a whole."""
    prompt_fits = [row for row in rows if len(row.words) <= settings.max_prompt_chars]
    kept = [
        row
        for row in prompt_fits
        if all(len(text) <= settings.max_response_chars for text in row.responses)
    ]
    return kept, {
        "prompt_too_long": len(rows) - len(prompt_fits),
        "response_too_long": len(prompt_fits) - len(kept),
    }


def said_once(rows: Sequence[Row], _settings: RuleSettings, _consents: Consents) -> Kept:
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
        return "rm", row.rater and row.rater.user_id, row.completion_id
    return row.set, row.prompt, row.responses


def prefix_once(rows: Sequence[Row], settings: RuleSettings, _consents: Consents) -> Kept:
    """Of a set's prompts that begin with the same characters, only the first; all its rows stay.

    Sharing a prefix of n characters is being equal in the first n: a look-up finds a cluster.
    """
    first: dict[tuple[SetName, str], str] = {}
    clusters: dict[tuple[SetName, str], set[str]] = defaultdict(set)
    kept = []
    for row in rows:
        if len(row.words) < settings.common_prefix_chars:
            kept.append(row)
            continue
        key = row.set, row.words[: settings.common_prefix_chars]
        if first.setdefault(key, row.words) == row.words:
            kept.append(row)
        else:
            clusters[key].add(row.words)
    dropped = sum(len(words) for words in clusters.values())
    return kept, {"clusters": len(clusters), "prompts_dropped": dropped}


def capped_per_user(rows: Sequence[Row], settings: RuleSettings, _consents: Consents) -> Kept:
    """The first prompts of each owner, counted over the three sets together."""
    prompts: dict[str, set[object]] = defaultdict(set)
    kept = []
    capped = set()
    for row in rows:
        mine = prompts[row.owner.user_id]
        if row.prompt in mine or len(mine) < settings.prompts_per_user:
            mine.add(row.prompt)
            kept.append(row)
        else:
            capped.add(row.owner.user_id)
    return kept, {"people_capped": len(capped)}


def split_by_user(rows: Sequence[Row], settings: RuleSettings, _consents: Consents) -> Kept:
    """Each row to its person's split: the rater's for RM, the owner's else.

    A ranking of another person's prompt is dropped where the two are in different splits;
    imported prompts have no person behind them.
    """
    kept = []
    apart = 0
    for row in rows:
        split = split_of((row.rater or row.owner).user_id, settings)
        person = row.owner.source != "import"
        if person and split_of(row.owner.user_id, settings) != split:
            apart += 1
        else:
            kept.append(replace(row, split=split))
    return kept, {"owner_and_rater_apart": apart}


def split_of(user_id: str, settings: RuleSettings) -> Split:
    """A person's split: by hash alone, so that nobody changes sides as the data grows."""
    digest = hashlib.sha256(b"instructloop split 1\0" + user_id.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < settings.train_fraction:
        return "train"
    if position < settings.train_fraction + settings.validation_fraction:
        return "validation"
    return "test"


RULES = (
    Rule("consented", 1, (), consented),
    Rule("short_enough", 1, ("max_prompt_chars", "max_response_chars"), short_enough),
    Rule("said_once", 1, (), said_once),
    Rule("prefix_once", 1, ("common_prefix_chars",), prefix_once),
    Rule("capped_per_user", 1, ("prompts_per_user",), capped_per_user),
    Rule("split_by_user", 1, ("train_fraction", "validation_fraction"), split_by_user),
)
