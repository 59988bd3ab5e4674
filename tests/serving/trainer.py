"""A trainer: releases of the model that a House serves, in a registry on another machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from contracts.release import Release, ReleaseRegistry
from serving.push import Offer
from serving.transport import Meeting
from tests.serving.house import model_folder

WEIGHTS = "model.safetensors"


@dataclass
class Trainer:
    """A registry of its own, on a machine of its own."""

    registry: ReleaseRegistry
    aside: Path
    served: Release

    def release(
        self,
        release_id: str,
        seed: float,
        spoil: Callable[[Path], object] = lambda _: None,
        **record: Any,
    ) -> Release:
        """Other weights of the model that r1 is of, spoiled before they are stored."""
        folder = model_folder(self.aside / release_id)
        tensors = {name: t + seed for name, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
        spoil(folder)
        facts = {"artifact": self.registry.artifacts.put("policy", folder), "parent": "r1"}
        release = self.served.model_copy(update={"id": release_id, **facts, **record})
        self.registry.add(release)
        return release

    def path(self, release: Release) -> Path:
        return self.registry.artifacts.path(release.artifact)

    def offered(self, release: Release, port: int, **other: Any) -> dict[str, Any]:
        """The body of a push by a trainer that waits at `port`."""
        meeting = Meeting(host="127.0.0.1", port=port, secret="5e" * 32)
        offer = Offer.of(release, self.path(release), "tcp", meeting)
        return offer.model_dump(mode="json") | other


def change(how: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        how(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)
