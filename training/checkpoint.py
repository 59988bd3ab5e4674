"""The whole state of an unfinished stage, so that it goes on where it was killed."""

import hashlib
import io
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from contracts.artifact import fsync
from contracts.errors import CorruptArtifact, InvalidInput
from training import ranks
from training.config import StageConfig
from training.device import random_states, restore_random

# The folder of checkpoints, beside what the stages of a run will be saved into.
CHECKPOINTS = "checkpoint"
# In a checkpoint: what is neither a weight nor an optimizer's moment.
REST = "rest"


class Stateful(Protocol):
    """What a checkpoint is made of: a model, an optimizer, an order of data, figures so far."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Checkpoint:
    """Saves `parts` and torch's random numbers every `config.checkpoint_every` steps.

    A checkpoint is a folder in which every rank writes its share, and from which any number of
    ranks, on any device, can go on. It appears at once: whatever happens while it is written, the
    one before can be read. A stage that goes on from it ends, on the same machine and as many
    ranks, where it would have ended undisturbed.
    """

    def __init__(
        self, folder: Path, config: StageConfig, data: object, parts: Mapping[str, Stateful]
    ) -> None:
        """Of the stage that will be saved into `folder`: the last checkpoint is beside it, in
        CHECKPOINTS, named by its step, and stays when the stage is done. `data` is what is trained
        on; its repr tells it from other.
        """
        self.folder = folder.parent / CHECKPOINTS
        self._own = self.folder / folder.name
        self._every, self._parts, self._device = config.checkpoint_every, parts, config.device
        seen = hashlib.sha256(repr(data).encode()).hexdigest()
        self._of = {"config": config.model_dump(mode="json"), "data": seen}

    def saved(self) -> list[Path]:
        """What can be gone on from, the last one last."""
        return sorted(
            (p for p in self._own.glob("*") if p.name.isdigit()), key=lambda p: int(p.name)
        )

    def restore(self) -> int:
        """Bring the parts to where the last checkpoint left them; how many steps were done, 0
        without one.

        Raises InvalidInput where it is of another configuration or other data, and CorruptArtifact
        where it is not a checkpoint.
        """
        if not (saved := self.saved()):
            return 0
        last, packed = saved[-1], {REST: b""}
        _read(last, packed)
        rest = torch.load(io.BytesIO(packed[REST]), weights_only=True)
        if rest["of"] != self._of:
            expected = f"a checkpoint of {self._of}; delete it to start over"
            raise InvalidInput(str(last), expected, rest["of"])
        _read(last, self._tensors())
        for name, state in rest["states"].items():
            self._parts[name].load_state_dict(state)
        if ranks.rank() < len(rest["random"]):
            restore_random(rest["random"][ranks.rank()], self._device)
        return int(rest["done"])

    def save(self, done: int) -> None:
        """Write the state after `done` steps, where it is time to. Raises OSError."""
        if self._every == 0 or done % self._every:
            return
        tensors, rest = self._tensors(), io.BytesIO()
        states = {n: part.state_dict() for n, part in self._parts.items() if n not in tensors}
        random = ranks.everyone(random_states(self._device))
        torch.save({"of": self._of, "done": done, "random": random, "states": states}, rest)
        whole, aside = self._own / str(done), self._own / f".{done}"
        if ranks.first():
            shutil.rmtree(aside, ignore_errors=True)
        try:
            state, writer = {**tensors, REST: rest.getvalue()}, FileSystemWriter(aside)
            with _one_rank_is_enough():
                save(state, storage_writer=writer, no_dist=ranks.size() == 1)
            if ranks.first():
                self._replace(aside, whole)
        except (CheckpointException, OSError) as e:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{whole}: not written, what was there before still is") from e

    def _replace(self, aside: Path, whole: Path) -> None:
        """The new checkpoint for those before it."""
        before = self.saved()
        fsync(aside)
        aside.rename(whole)
        fsync(self._own)
        for old in before:
            shutil.rmtree(old)

    def _tensors(self) -> dict[str, dict[str, Any]]:
        """Weights that are not frozen, and moments, by part, which are read in place."""
        found = {}
        for name, part in self._parts.items():
            if isinstance(part, nn.Module):
                weights = part.named_parameters(remove_duplicate=False)
                frozen = {n for n, x in weights if not x.requires_grad}
                found[name] = {n: x for n, x in part.state_dict().items() if n not in frozen}
            elif isinstance(part, torch.optim.Optimizer):
                found[name] = part.state_dict()["state"]
        return found


def _read(folder: Path, state: dict[str, Any]) -> None:
    """What `state` names, in place. Raises CorruptArtifact."""
    try:
        with _one_rank_is_enough():
            load(state, storage_reader=FileSystemReader(folder), no_dist=ranks.size() == 1)
    except CheckpointException as e:
        raise CorruptArtifact(f"{folder}: not a checkpoint; delete it to start over") from e


@contextmanager
def _one_rank_is_enough() -> Iterator[None]:
    """Without torch's warning where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield
