"""A stage's figures: one JSON line a step, and the same as TensorBoard files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from training import ranks


class Metrics:
    """Writes `metrics.jsonl` and TensorBoard event files into `folder`, on rank 0; keeps the rows
    for the report.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, float]] = []
        self._files: tuple[TextIO, SummaryWriter] | None = None
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)
            lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
            self._files = lines, SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, **figures: float) -> None:
        row = {"step": step, **{k: float(v) for k, v in figures.items()}}
        self.rows.append(row)
        if self._files is not None:
            lines, board = self._files
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            for name, value in figures.items():
                board.add_scalar(name, value, step)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write the rows of a checkpoint again, in the place of what an interrupted run wrote."""
        for row in state["rows"]:
            figures = dict(row)
            self.write(int(figures.pop("step")), **figures)

    def close(self) -> None:
        for file in self._files or ():
            file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows that a stage wrote."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


EXTREMES = {"ratio_min": min, "ratio_max": max}


def sum_of(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of what each rank has a share of; extremes stay extremes."""
    return {name: EXTREMES.get(name, sum)(s[name] for s in shares) for name in shares[0]}


def mean_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over minibatches; extremes stay extremes."""
    return {n: x if n in EXTREMES else x / len(steps) for n, x in sum_of(steps).items()}
