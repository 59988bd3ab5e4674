"""DatasetManifest: event range, rule versions, splits, counts; the columns of the three sets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

MANIFEST = "dataset.json"

SetName = Literal["sft", "rm", "ppo"]
Split = Literal["train", "validation", "test"]
SETS: tuple[SetName, ...] = ("sft", "rm", "ppo")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Columns of `<set>.parquet`. `messages` is a list of {role, content}, empty where the prompt was
# raw `text`; `use_case_by` is label or classifier; `language` an ISO 639-1 code; `masked` lists the
# kinds of what was masked in prompt and answers.
PROMPT_COLUMNS = (
    "id", "user_id", "text", "messages", "use_case", "use_case_by", "language", "masked", "source",
    "split",
)  # fmt: skip
# + response: string
SFT_COLUMNS = (*PROMPT_COLUMNS, "response")
# + rater_id: string; responses: list<string>; finished: list<bool> (false: cut by max_tokens);
#   ranks: list<int32>, 0 best, ties equal, aligned with responses; release_id: string;
#   annotations: list of {name, value}, what the rater said beside the order
RM_COLUMNS = (
    *PROMPT_COLUMNS, "rater_id", "responses", "finished", "releases", "ranks", "release_id",
    "annotations",
)  # fmt: skip
PPO_COLUMNS = PROMPT_COLUMNS

# Whose row is which, without any text: it stays when the texts are erased.
INDEX = "rows.parquet"
INDEX_COLUMNS = ("set", "split", "id", "completion_id", "user_id", "rater_id", "release_id")


class RuleCount(BaseModel):
    """What one rule let through: rows in and out, per set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    version: int
    rows_in: dict[SetName, int]
    rows_out: dict[SetName, int]
    # Values of the rule's settings, and what it wants to report (dropped clusters, languages).
    settings: dict[str, bool | str | int | float]
    notes: dict[str, int]


class DatasetManifest(BaseModel):
    """What a dataset was made of. Stored as `dataset.json` beside the Parquet files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    # topic -> partition -> [first offset, end offset)
    events: dict[str, dict[int, tuple[int, int]]]
    rules: tuple[RuleCount, ...]
    # set -> split -> rows
    rows: dict[SetName, dict[Split, int]]
    # Distinct people whose data is inside: user id -> rows over all sets.
    people: dict[str, int]
    # set -> use case -> rows.
    use_cases: dict[SetName, dict[str, int]] = {}
    # set -> "prompt" or "response" -> characters: min, median, p90, max.
    lengths: dict[SetName, dict[str, dict[str, int]]] = {}
    code_version: str
