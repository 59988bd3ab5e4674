import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import fuzz
from feedback.pii import Masked
from tests.feedback.machines import MACHINES
from tests.feedback.test_machines import Forgetful


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_takes_its_seeds_and_what_comes_of_them(name: str) -> None:
    target, _, bound = fuzz.TARGETS[name]
    for seed in fuzz.seeds(name):
        target(seed)
        assert len(seed) <= bound
    runs, crashed = fuzz.fuzz(name, 300)
    assert runs >= 300 and not crashed


def test_a_target_that_finds_something_ends_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz, "mask", lambda text: Masked(text, Counter(EMAIL=1)))
    with pytest.raises(AssertionError):
        fuzz.mask_text(b"ann@example.org")


def test_a_process_that_ends_badly_counts_as_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import sys; print('#7 pulse', file=sys.stderr); sys.exit(77)"

    def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        return real([sys.executable, "-c", crash], capture_output=True, text=True, check=False)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    assert fuzz.fuzz("mask_text", 10) == (7, True)


def test_the_steps_of_the_machines_are_counted_and_so_is_one_that_fails() -> None:
    steps, failures = fuzz.stateful(MACHINES, 5)
    assert steps > 100 and failures == 0
    assert fuzz.stateful([Forgetful], 50)[1] == 1
