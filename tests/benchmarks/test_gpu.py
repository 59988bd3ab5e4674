import pytest

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
