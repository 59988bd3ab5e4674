"""Times a trainer's training alone, without what it prepares, and keeps what it logs."""

from typing import Any

from transformers import TrainerCallback

from benchmarks.trl.worker import Clock


class Stopwatch(TrainerCallback):
    """`losses` of the logged steps; `logs` as they were last."""

    def __init__(self) -> None:
        self.clock, self.losses = Clock(), list[float]()
        self.logs: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.stop()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.logs = kwargs["logs"]
        if "loss" in self.logs:
            self.losses.append(float(self.logs["loss"]))
