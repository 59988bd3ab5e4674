"""The whole state of an unfinished stage in one file, so that it goes on where it was killed."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from contracts.artifact import fsync
from contracts.errors import CorruptArtifact, InvalidInput
from training.config import StageConfig

# The folder of these files, beside what the stages of a run will be saved into.
CHECKPOINTS = "checkpoint"


class Stateful(Protocol):
    """What a checkpoint is made of: a model, an optimizer, an order of data, figures so far."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Checkpoint:
    """Saves `parts` and torch's random numbers every `config.checkpoint_every` steps.

    The file is replaced at once: whatever happens while it is written, the one before can be read.
    A stage that goes on from it ends, on the same machine, where it would have ended undisturbed.
    """

    def __init__(
        self, folder: Path, config: StageConfig, data: object, parts: Mapping[str, Stateful]
    ) -> None:
        """Of the stage that will be saved into `folder`: the file is beside it, in CHECKPOINTS, and
        stays when the stage is done. `data` is what is trained on; its repr tells it from other.
        """
        self.folder = folder.parent / CHECKPOINTS
        self.file = self.folder / f"{folder.name}.pt"
        self._every, self._parts = config.checkpoint_every, parts
        seen = hashlib.sha256(repr(data).encode()).hexdigest()
        self._of = {"config": config.model_dump(mode="json"), "data": seen}

    def restore(self) -> int:
        """Bring the parts to where the file left them; how many steps were done, 0 without a file.

        Raises InvalidInput where the file is of another configuration or other data, and
        CorruptArtifact where it is not a checkpoint.
        """
        if not self.file.is_file():
            return 0
        try:
            saved = torch.load(self.file, weights_only=True)
            of, done, random = saved["of"], saved["done"], saved["random"]
        except Exception as e:
            raise CorruptArtifact(f"{self.file}: not a checkpoint; delete it to start over") from e
        if of != self._of:
            expected = f"a checkpoint of {self._of}; delete it to start over"
            raise InvalidInput(str(self.file), expected, of)
        for name, part in self._parts.items():
            part.load_state_dict(saved["parts"][name])
        torch.set_rng_state(random)
        return int(done)

    def save(self, done: int) -> None:
        """Write the state after `done` steps, where it is time to. Raises OSError."""
        if self._every == 0 or done % self._every:
            return
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        state = {"of": self._of, "done": done, "random": torch.get_rng_state(), "parts": parts}
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}")
        try:
            with aside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(self.file)
        except (OSError, RuntimeError) as e:  # torch hides the system's error behind its own
            raise OSError(f"{self.file}: not written, what it held is still there") from e
        finally:
            aside.unlink(missing_ok=True)
        fsync(self.folder)
