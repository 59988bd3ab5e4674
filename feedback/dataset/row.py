"""A row on its way through the rules, and what a rule gets and gives. No row holds a text: it
holds what the rules ask of texts, and where the texts stand in the log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from contracts.dataset import SetName, Split
from feedback.consent import ConsentState
from feedback.dataset.settings import RuleSettings


class Share(Struct, frozen=True, array_like=True, gc=False):
    """What one person put into a row: the prompt's owner, or the rater."""

    user_id: str
    source: str
    notice: str
    # Event time in seconds since 1970.
    at: float


class Words(Struct, frozen=True, array_like=True, gc=False):
    """What the rules ask of an answer."""

    # Equal texts have equal digests (BLAKE2b, 16 bytes).
    digest: bytes
    chars: int
    # Once personal data and secrets became their kinds, and the kind of each that was found.
    masked_chars: int
    found: tuple[str, ...] = ()


class Prompt(Struct, frozen=True, array_like=True, gc=False):
    """What the rules ask of a prompt. Its words are contracts.events.prompt_text."""

    # Of the words, and of the prompt in its form: raw text, or messages with their roles.
    words: bytes
    said: bytes
    chars: int
    masked_chars: int
    found: tuple[str, ...]
    # ISO 639-1.
    language: str
    # The use case that its words hint at.
    hint: str
    # Digest of the first characters, as many as the settings say; empty where it has fewer.
    beginning: bytes
    # MinHash of its shingles, a byte a permutation.
    sketch: bytes


# Partition and offset of an event in its topic.
Place = tuple[int, int]


class Row(Struct, frozen=True, array_like=True, kw_only=True):
    """One row of one set on its way through the rules."""

    set: SetName
    # Id of the event that the row comes from; of the ranking for the reward model.
    id: str
    owner: Share
    prompt: Prompt
    use_case: str = ""
    # Who says so: the prompt's label, or our classifier.
    use_case_by: str = "label"
    # Kinds of what was masked in prompt and answers, in alphabetical order.
    masked: tuple[str, ...] = ()
    # SFT: the one answer; RM: the K answers, in the order of the completion's outputs.
    responses: tuple[Words, ...] = ()
    # RM only, aligned with responses: index of the output, and its rank.
    outputs: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    rater: Share | None = None
    # RM only: what is found in what the rater said beside the order; whether that is anything.
    annotated: tuple[str, ...] | None = None
    # RM only: (better, worse) positions in responses that are known beforehand.
    known: tuple[tuple[int, int], ...] = ()
    # Public id of the completion; empty for a demonstration.
    completion_id: str = ""
    release_id: str = ""
    # Of the row's own event; one rater's events are in one partition, so offsets order them.
    at: Place = (0, 0)
    # Of the event with the prompt and the answers.
    texts_at: Place = (0, 0)
    split: Split = "train"

    @property
    def people(self) -> tuple[Share, ...]:
        return (self.owner,) if self.rater is None else (self.owner, self.rater)

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
