"""Everything that the dataset's rules may be told."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from contracts.dataset import SetName
from contracts.fields import at_odds

SourceName = Literal["playground", "api", "labeler", "import"]
SOURCES: tuple[SourceName, ...] = ("playground", "api", "labeler", "import")
# Who wrote a prompt: a hired labeler, a customer (playground, api), or a public file's author.
Group = Literal["labeler", "customer", "import"]
Mix = dict[SetName, dict[Group, float]]
# InstructGPT, table 6: prompts of the training sets.
PAPER_MIX: Mix = {
    "sft": {"labeler": 11295, "customer": 1430},
    "rm": {"labeler": 6623, "customer": 26584},
    "ppo": {"customer": 31144},
}


class RuleSettings(BaseModel):
    """Lengths are in characters: feedback has no tokenizer, so the trainer drops again, by tokens.

    A share or a similarity of 1 and a count of 0 switch their rule off where the comment says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceName, ...] = SOURCES
    # InstructGPT, appendix C: prompts over 1k tokens are dropped, answers are at most 1k;
    # 4 characters a token.
    max_prompt_chars: int = Field(default=4000, ge=1)
    max_response_chars: int = Field(default=4000, ge=1)
    # Estimated Jaccard similarity of 5-character shingles from which two prompts are the same;
    # 1: only equal ones are.
    near_duplicate_similarity: float = Field(default=0.8, gt=0, le=1)
    # InstructGPT, section 3.2, drops prompts with "a long common prefix" without a number;
    # ours: two sentences.
    common_prefix_chars: int = Field(default=200, ge=1)
    # InstructGPT, section 3.2.
    prompts_per_user: int = Field(default=200, ge=1)
    # InstructGPT, section 3.2: personal data is removed from training prompts.
    mask_pii: bool = True
    # What a person must have confirmed before the dataset is trained on: nothing, what was masked,
    # or every prompt (the paper's way).
    review: Literal["none", "masked", "all"] = "none"
    # A prompt without a label gets its use case from words in it.
    classify_use_case: bool = True
    # Against raters who answer at random or on purpose wrongly. A known answer is a comparison
    # that a labeler's or an imported completion brings in its metadata.
    min_known_answers_right: float = Field(default=0.7, ge=0, le=1)
    # Share of pairs on which a rater orders as most others do; 0: not asked.
    min_rater_agreement: float = Field(default=0.4, ge=0, le=1)
    # Pairs from which either share is worth looking at.
    min_rater_pairs: int = Field(default=20, ge=1)
    # Largest share of the training rankings that are one rater's; 1: no bound.
    max_rater_share: float = Field(default=1.0, gt=0, le=1)
    # InstructGPT, section 3.2, splits by user id without a ratio; ours: the usual 80 / 10 / 10,
    # where test is the rest.
    train_fraction: float = Field(default=0.8, ge=0, le=1)
    validation_fraction: float = Field(default=0.1, ge=0, le=1)
    # Set to group to weight: the training rows are thinned out to this ratio. A group without a
    # weight is left out; a set that is not named takes everything. "paper" stands for PAPER_MIX.
    mix: Mix = {}

    @field_validator("mix", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return PAPER_MIX if value == "paper" else value

    @model_validator(mode="after")
    def _fit(self) -> "RuleSettings":
        if self.train_fraction + self.validation_fraction > 1:
            expected = f"at most 1 together with train_fraction, {self.train_fraction}"
            raise at_odds("validation_fraction", expected, self.validation_fraction)
        for name, weights in self.mix.items():
            if not weights or min(weights.values()) <= 0:
                raise at_odds(f"mix.{name}", "weights above 0", weights)
        return self
