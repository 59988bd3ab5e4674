import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.artifact import ArtifactManifest
from contracts.errors import CorruptArtifact, InvalidInput
from contracts.release import ReleaseRegistry
from serving.push import Offer
from tests.serving.house import publish
from tests.serving.trainer import WEIGHTS, Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    served = ReleaseRegistry(tmp_path / "server")
    publish(served, tmp_path)
    return Trainer(ReleaseRegistry(tmp_path / "trainer"), tmp_path / "aside", served.get("r1"))


def header(how: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """The tensors are `layers.0.linear.weight`, of 16 bytes, and `weight`, of 4."""

    def spoil(offer: dict[str, Any]) -> None:
        entries = json.loads(offer["headers"][WEIGHTS])
        how(entries)
        padded = json.dumps(entries).ljust(len(offer["headers"][WEIGHTS]))
        offer["headers"][WEIGHTS] = padded

    return spoil


def manifest(how: Callable[[list[dict[str, Any]]], object]) -> Callable[[dict[str, Any]], object]:
    """With the digest that belongs to it."""

    def spoil(offer: dict[str, Any]) -> None:
        how(offer["manifest"]["files"])
        said = ArtifactManifest.model_validate(offer["manifest"])
        offer["release"]["artifact"] = said.digest

    return spoil


def unsaid(name: str, text: str) -> Callable[[dict[str, Any]], object]:
    """A file of the artifact whose text is not in the offer."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    entry = {"path": name, "sha256": digest, "bytes": len(text)}
    return manifest(lambda files: files.append(entry))


def index(weight_map: str) -> Callable[[dict[str, Any]], None]:
    name, text = "model.safetensors.index.json", f'{{"weight_map": {weight_map}}}'

    def change(offer: dict[str, Any]) -> None:
        offer["texts"][name] = text
        unsaid(name, text)(offer)

    return change


def twice(offer: dict[str, Any]) -> None:
    offer["headers"]["more.safetensors"] = offer["headers"][WEIGHTS]
    first = next(f for f in offer["manifest"]["files"] if f["path"] == WEIGHTS)
    manifest(lambda files: files.append({**first, "path": "more.safetensors"}))(offer)


SPOILED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "another manifest": ("expected digest", lambda o: o["manifest"]["files"].pop()),
    "another kind": (
        "kind policy",
        lambda o: (o["manifest"].update(kind="dataset"), manifest(bool)(o)),
    ),
    "another config": (
        "config.json: expected sha256",
        lambda o: o["texts"].update({"config.json": "[]"}),
    ),
    "no config": (
        "texts: expected those of ['config.json']",
        lambda o: o["texts"].clear(),
    ),
    "config unsaid": ("texts: expected those of", unsaid("generation_config.json", "{}")),
    "index unsaid": (
        "texts: expected those of",
        unsaid("model.safetensors.index.json", '{"weight_map": {}}'),
    ),
    "text of none": ("texts: expected those of", lambda o: o["texts"].update({"a.json": "{}"})),
    "no header": ("headers: expected those of", lambda o: o["headers"].clear()),
    "no weights": ("headers: expected those of []", manifest(lambda files: files.pop(1))),
    "not JSON": ("expected JSON", lambda o: o["headers"].update({WEIGHTS: "{"})),
    "no offsets": ("data_offsets", header(lambda e: e["weight"].pop("data_offsets"))),
    "overlap": ("bytes 16 to 20", header(lambda e: e["weight"].update(data_offsets=[12, 16]))),
    "gap": ("bytes 16 to 20", header(lambda e: e["weight"].update(data_offsets=[20, 24]))),
    "negative": ("greater than or equal to 0", header(lambda e: e["weight"].update(shape=[-1]))),
    "too long": ("bytes 16 to 24", header(lambda e: e["weight"].update(shape=[2]))),
    "too few": ("16 bytes of tensors", header(lambda e: e.pop("weight"))),
    "unknown dtype": ("one of F64", header(lambda e: e["weight"].update(dtype="F4"))),
    "index lies": ("weight_map", index('{"weight": "other.safetensors"}')),
    "index of a list": ("weight_map: expected the files that hold", index('["weight"]')),
    "tensor twice": ("one tensor of that name", twice),
}


@pytest.mark.parametrize("name", SPOILED)
def test_offer_that_contradicts_itself_is_refused(trainer: Trainer, name: str) -> None:
    says, spoil = SPOILED[name]
    offer = trainer.offered(trainer.release("offered", 1.0), 1)
    assert Offer.model_validate(offer).checkpoint().tensors.keys() >= {"weight"}
    spoil(offer)
    with pytest.raises((InvalidInput, CorruptArtifact)) as refused:
        Offer.model_validate(offer).checkpoint()
    assert says in str(refused.value)
