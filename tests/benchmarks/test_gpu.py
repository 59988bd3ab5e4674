import pytest

from benchmarks import gpu_training
from benchmarks.gpu import Case, Size, cases, check

SMALL = Size(tokens=48, hidden=16, vocab=64, rows=6, width=40, prompts=5, k=4)


CASES = list(cases("cpu", SMALL, "eager", compiled=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sides_of_a_case_compute_the_same(case: Case) -> None:
    check(case)


def test_sides_that_differ_are_not_timed() -> None:
    case = CASES[0]
    wrong = Case("head", {**case.sides, "other": lambda: case.sides["eager"]() * 2}, case.bytes)
    with pytest.raises(RuntimeError, match="head: other"):
        check(wrong)


def test_steps_of_training_run_and_count_their_tokens() -> None:
    few = gpu_training.Size(texts=2, prompts=2, k=3, episodes=4, text_tokens=8)
    made = {}
    for step in gpu_training.steps("cpu", "tiny", "fp32", few):
        step.run()
        made[step.name] = step.tokens
    assert made.keys() == {"sft", "reward_model", "ppo"}
    assert all(2 * 8 < tokens < 2000 for tokens in made.values())
