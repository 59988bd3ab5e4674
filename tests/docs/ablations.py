"""Plots of docs/results.md, drawn by `make docs` from benchmarks/results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructloop.plots import Sweep, sweeps
from tests.docs.figures import RESULTS

# Worlds with their suites; settings and, in the order of the panels, what is drawn of each.
WORLDS = {"generated": "ablations", "e2e": "ablations_e2e"}
SETTINGS = {
    "ptx": ("ptx coefficient", ("lm_loss_rise", "kl", "reward_gain", "gold_gain")),
    "beta": ("beta", ("lm_loss_rise", "kl", "reward_gain", "gold_gain")),
    "episodes": ("episodes", ("kl", "reward", "gold")),
}
TITLES = {
    "lm_loss_rise": "Text loss over SFT, nats",
    "kl": "KL to SFT, nats",
    "reward": "Reward",
    "reward_gain": "Reward over SFT",
    "gold": "Gold",
    "gold_gain": "Gold over SFT",
}
# Of the suite that compares advantages.
COMPARED = {
    "reward": "Reward at 0.5 nats",
    "gold": "Gold at 0.5 nats",
    "cpu": "CPU s an episode",
    "learning": "Of these, without sampling",
}


def plots(docs: Path) -> dict[Path, str]:
    """One picture for each world and one of advantages, on white: a page may be dark."""
    drawn = {
        f"ablations-{world}.svg": [
            _row(results(suite), f"{world}.", setting, label, {m: TITLES[m] for m in measures})
            for setting, (label, measures) in SETTINGS.items()
        ]
        for world, suite in WORLDS.items()
    }
    compared = results("advantages")
    drawn["advantages.svg"] = [_row(compared, "", "advantage", "advantage", COMPARED)]
    return {
        docs / name: sweeps(rows).replace("<svg ", '<svg style="background: white" ', 1)
        for name, rows in drawn.items()
    }


def results(suite: str) -> list[dict[str, Any]]:
    """The figures of a suite."""
    result = json.loads((RESULTS / f"{suite}.json").read_text("utf-8"))
    found: list[dict[str, Any]] = result["figures"]
    return found


def _row(
    figures: list[dict[str, Any]], world: str, setting: str, label: str, titles: Mapping[str, str]
) -> list[Sweep]:
    """A panel for each measure that `titles` names."""
    row = []
    for measure, title in titles.items():
        head = f"{world}{measure}@{setting}="
        found = [f for f in figures if f["figure"].startswith(head)]
        values = [f["figure"].removeprefix(head) for f in found]
        spreads = [(f["min"], f["value"], f["max"]) for f in found]
        row.append(Sweep(title, label, values, spreads))
    return row
