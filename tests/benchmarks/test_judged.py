"""A judged sampler says of each batch what its judge says."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.judged import Judged
from tests import tiny_models
from training.data import PromptRow

pytestmark = pytest.mark.vllm


def longer(
    rows: Sequence[PromptRow], texts: Sequence[str], finished: Sequence[bool]
) -> list[float]:
    """One point for a prompt's letter, and one for each character of the answer."""
    points = {"a": 1000.0, "b": 2000.0}
    return [points[row.text] + len(text) for row, text in zip(rows, texts, strict=True)]


def test_the_mean_of_a_batch_is_of_its_own_prompts_and_answers(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model", 1, tied=True)
    rows = [PromptRow(text, text, text, (), "") for text in "ab"]
    sampler = Judged(folder, 32, rows, longer)
    try:
        answers = sampler.answers([rows[1]], max_tokens=8, seed=0, samples=3)
        both = sampler.answers(rows, max_tokens=8, seed=1, samples=2)
    finally:
        sampler.close()
    lengths = [len(text) for text, _ in answers[0]]
    assert len(lengths) == 3 and max(lengths) > 0
    again = [1000 + len(text) for text, _ in both[0]] + [2000 + len(text) for text, _ in both[1]]
    assert sampler.means == pytest.approx([2000 + sum(lengths) / 3, sum(again) / 4])
