"""Plots of docs/results.md, drawn by `make docs` from the results of the ablations."""

import json
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


def plots(docs: Path) -> dict[Path, str]:
    """One picture for each world, on white: a page may be dark."""
    return {
        docs / f"ablations-{world}.svg": sweeps(
            [_row(results(suite), world, setting) for setting in SETTINGS]
        ).replace("<svg ", '<svg style="background: white" ', 1)
        for world, suite in WORLDS.items()
    }


def results(suite: str) -> list[dict[str, Any]]:
    """The figures of a suite."""
    result = json.loads((RESULTS / f"{suite}.json").read_text("utf-8"))
    found: list[dict[str, Any]] = result["figures"]
    return found


def _row(figures: list[dict[str, Any]], world: str, setting: str) -> list[Sweep]:
    label, measures = SETTINGS[setting]
    row = []
    for measure in measures:
        head = f"{world}.{measure}@{setting}="
        found = [f for f in figures if f["figure"].startswith(head)]
        values = [f["figure"].removeprefix(head) for f in found]
        spreads = [(f["min"], f["value"], f["max"]) for f in found]
        row.append(Sweep(TITLES[measure], label, values, spreads))
    return row
