"""A stage's figures: one JSON line a step, and the same as TensorBoard files."""

import json
from pathlib import Path

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

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows that a stage wrote."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
