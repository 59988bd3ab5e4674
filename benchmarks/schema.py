"""Schemathesis over the OpenAPI document, all checks, on a fake engine: how many requests were made
of it, and what was wrong with the answers.
"""

import os
import tempfile
from pathlib import Path

from benchmarks.result import Figure, figure
from tests.serving.documented import Outcome, ask_all
from tests.serving.house import house

QUICK = os.environ.get("QUICK", "") not in {"", "0"}
# Random cases for each operation, beside those that each run makes of every bound in the document.
EXAMPLES = 10 if QUICK else 200
SEEDS = (1,) if QUICK else (1, 2, 3)


def measure() -> list[Figure]:
    found = [_run(seed) for seed in SEEDS]
    for outcome in found:
        if outcome.failures:
            print(outcome.said)
    return [
        figure("cases", [sum(f.cases for f in found)], "requests", ">= 20000"),
        figure("failures", [sum(f.failures for f in found)], "kinds", "0"),
        figure("server_errors", [sum(f.server_errors for f in found)], "kinds", "0"),
    ]


def _run(seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as aside, house(Path(aside) / "house") as here:
        return ask_all(here, Path(aside), EXAMPLES, seed)
