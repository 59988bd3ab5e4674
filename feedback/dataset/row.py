"""A row on its way through the rules, and what a rule gets and gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from contracts.dataset import SetName, Split
from feedback.consent import ConsentState
from feedback.dataset.settings import RuleSettings


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
    # Who says so: the prompt's label, or our classifier.
    use_case_by: str = "label"
    language: str = ""
    # Kinds of what was masked in prompt and answers, in alphabetical order.
    masked: tuple[str, ...] = ()
    # SFT: the one answer; RM: the K answers.
    responses: tuple[str, ...] = ()
    # RM only, aligned with responses.
    finished: tuple[bool, ...] = ()
    ranks: tuple[int, ...] = ()
    rater: Share | None = None
    # RM only: what the rater said beside the order, in alphabetical order.
    annotations: tuple[tuple[str, str], ...] = ()
    # RM only: (better, worse) positions in responses that are known beforehand.
    known: tuple[tuple[int, int], ...] = ()
    # Public id of the completion; empty for a demonstration.
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

    @property
    def rater_id(self) -> str:
        return self.rater.user_id if self.rater else ""


Notes = dict[str, int]
Kept = tuple[list[Row], Notes]


@dataclass(frozen=True)
class Given:
    """What rules know beside the rows."""

    settings: RuleSettings = field(default_factory=RuleSettings)
    consents: Mapping[str, ConsentState] = field(default_factory=dict)
    # Row id to whether a reviewer keeps it.
    decisions: Mapping[str, bool] = field(default_factory=dict)


Keep = Callable[[Sequence[Row], Given], Kept]
