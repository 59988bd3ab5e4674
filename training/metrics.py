"""A stage's figures: one JSON line a step, and the same as TensorBoard files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes `metrics.jsonl` and TensorBoard event files into `folder`; keeps the rows for the
    report.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, **figures: float) -> None:
        row = {"step": step, **{k: float(v) for k, v in figures.items()}}
        self.rows.append(row)
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the rows of a checkpoint again, in the place of what an interrupted run wrote."""
        for row in state["rows"]:
            figures = dict(row)
            self.write(int(figures.pop("step")), **figures)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows that a stage wrote."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def mean_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over minibatches; extremes stay extremes."""
    reduce = {"ratio_min": min, "ratio_max": max}
    return {
        name: reduce[name](s[name] for s in steps)
        if name in reduce
        else sum(s[name] for s in steps) / len(steps)
        for name in steps[0]
    }
