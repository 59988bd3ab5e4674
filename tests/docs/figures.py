"""docs/figures.md: what the suites measured, from benchmarks/results."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
HEAD = """# Figures

What was measured, where and with which command: benchmarks/results, one file for each suite. This
page is written by `make docs`. A value is the median of its runs (of `accuracy_over_trl` the mean),
beside it the least and the greatest; of an estimate, its 95 % interval.
"""


def page() -> str:
    """One table for each suite."""
    files = sorted(RESULTS.glob("*.json"))
    return HEAD + "".join(_table(json.loads(path.read_text("utf-8"))) for path in files)


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"\n## {result['suite']}",
        "",
        f"`{result['command']}` at commit {result['commit'][:7]}, on {machine['cores']} cores of "
        f"{machine['processor']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        "| figure | value | from | to | unit | goal | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in result["figures"]:
        value, least, most = (_short(f[name]) for name in ("value", "min", "max"))
        row = (f"`{f['figure']}`", value, least, most, f["unit"], f["goal"], str(f["runs"]))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Four digits that say something; whole numbers as they are."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
