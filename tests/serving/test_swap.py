import asyncio
import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from contracts.events import Stamper
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving.gate import Gate
from serving.swap import EngineFailed, SwapOptions, WeightSwapper
from tests import tiny_models
from tests.fakes import FakeEngine, MemorySink

LAYER = "model.layers.0.mlp.down_proj.weight"


class Stage:
    """A registry with a first release served by a fake engine, and what it takes to publish
    another.
    """

    def __init__(self, root: Path, drain_bound_s: float = 5) -> None:
        self.root = root
        self.registry = ReleaseRegistry(root / "registry")
        self.engine, self.sink, self.gate = FakeEngine(), MemorySink(), Gate()
        self.swapper = WeightSwapper(
            self.engine,
            self.registry,
            self.gate,
            self.sink,
            Stamper("test", clock=lambda: 0.0),
            SwapOptions(drain_bound_s=drain_bound_s, canary_tolerance=0.01),
        )
        self.publish("r1", self.folder("first", seed=1))

    def folder(self, name: str, seed: int) -> Path:
        return tiny_models.save(self.root / name, seed, tied=False)

    def publish(
        self, release_id: str, folder: Path, model: str = "tiny", parent: str | None = None
    ) -> Release:
        release = Release(
            id=release_id,
            model=model,
            created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            artifact=self.registry.artifacts.put("policy", folder),
            canary=Canary(token_ids=(1, 2, 3), logprobs=(0.0, 0.0)),
            parent=parent,
            code_version="test",
        )
        self.registry.publish(release)
        return release

    def look(self) -> None:
        asyncio.run(self.swapper.look())

    def outcomes(self) -> list[tuple[str, str]]:
        return [(change.release, change.outcome) for change in self.swapper.changes]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path)
    stage.look()
    return stage


def serving(stage: Stage) -> str:
    assert stage.swapper.serving is not None and stage.engine.running is not None
    assert stage.engine.running.name == stage.swapper.serving.artifact
    return stage.swapper.serving.id


def test_first_release_is_loaded_and_the_next_one_swapped_in(stage: Stage) -> None:
    assert serving(stage) == "r1"
    release = stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.look()
    stage.look()
    assert serving(stage) == "r2"
    assert stage.outcomes() == [("r1", "swapped_in"), ("r2", "swapped_in")]
    assert stage.engine.swaps == 1 and stage.engine.staged is None
    last = stage.sink.release_changes()[-1]
    assert (last.release_id, last.release_digest) == ("r2", release.artifact)
    assert last.transition == pb.RELEASE_TRANSITION_SWAPPED_IN


def test_rollback_in_the_registry_swaps_back(stage: Stage) -> None:
    stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.look()
    stage.registry.rollback()
    stage.look()
    assert serving(stage) == "r1"
    assert stage.outcomes()[-1] == ("r1", "swapped_in")


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_json(name: str, **fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            change_weights(lambda w: w.update({LAYER: w[LAYER][:, :-1].contiguous()})),
            f"{LAYER}: expected F32",
        ),
        (
            change_weights(lambda w: w.update({LAYER: w[LAYER].bfloat16()})),
            f"{LAYER}: expected F32",
        ),
        (change_weights(lambda w: w.pop(LAYER)), f"{LAYER}: expected a tensor"),
        (change_weights(lambda w: w.update(extra=torch.zeros(1))), "extra: expected no tensor"),
        (change_json("tokenizer.json", version="2.0"), "tokenizer.json: expected the tokenizer"),
        (change_json("config.json", rope_theta=5.0), "config.rope_theta"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20),
            "safetensors header",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "at least one safetensors file"),
    ],
    ids=["shape", "dtype", "missing", "extra", "tokenizer", "config", "damaged", "no-weights"],
)
def test_release_that_does_not_fit_is_refused_once(
    stage: Stage, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = stage.folder("second", seed=2)
    spoil(folder)
    stage.publish("r2", folder)
    stage.look()
    stage.look()
    assert serving(stage) == "r1" and stage.engine.swaps == 0
    assert stage.outcomes() == [("r1", "swapped_in"), ("r2", "refused")]
    assert reason in (stage.swapper.changes[-1].reason or "")
    assert stage.sink.release_changes()[-1].transition == pb.RELEASE_TRANSITION_REFUSED


def test_release_whose_bytes_changed_is_refused(stage: Stage) -> None:
    release = stage.publish("r2", stage.folder("second", seed=2))
    weights = stage.registry.artifacts.path(release.artifact) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    stage.look()
    assert serving(stage) == "r1"
    assert "expected sha256" in (stage.swapper.changes[-1].reason or "")


def test_release_of_another_model_name_is_refused(stage: Stage) -> None:
    stage.publish("r2", stage.folder("second", seed=2), model="other")
    stage.look()
    assert stage.outcomes()[-1] == ("r2", "refused")


def test_release_that_the_engine_cannot_stage_is_refused(stage: Stage) -> None:
    stage.engine.staging_error = "expected finite numbers, got NaN"
    stage.publish("r2", stage.folder("second", seed=2))
    stage.look()
    assert stage.outcomes()[-1] == ("r2", "refused") and serving(stage) == "r1"


@pytest.mark.parametrize("got", [0.02, float("nan")])
def test_release_that_fails_its_canary_is_rolled_back(stage: Stage, got: float) -> None:
    release = stage.publish("r2", stage.folder("second", seed=2))
    stage.engine.says[release.artifact] = [0.0, got]
    stage.look()
    assert serving(stage) == "r1" and stage.engine.swaps == 2
    assert stage.outcomes()[-1] == ("r2", "rolled_back")
    assert stage.sink.release_changes()[-1].transition == pb.RELEASE_TRANSITION_ROLLED_BACK


def test_canary_may_differ_by_the_tolerance(stage: Stage) -> None:
    release = stage.publish("r2", stage.folder("second", seed=2))
    stage.engine.says[release.artifact] = [0.0, -0.009]
    stage.look()
    assert serving(stage) == "r2"


def test_engine_that_fails_the_old_canary_too_is_given_up(stage: Stage) -> None:
    release = stage.publish("r2", stage.folder("second", seed=2))
    first = stage.registry.get("r1")
    stage.engine.says = {release.artifact: [0.0, 1.0], first.artifact: [0.0, 1.0]}
    with pytest.raises(EngineFailed, match="in doubt"):
        stage.look()
    assert stage.swapper.serving is None


def test_dead_engine_ends_the_swapper(stage: Stage) -> None:
    stage.engine.broken = "killed"
    with pytest.raises(EngineFailed, match="killed"):
        asyncio.run(stage.swapper.run())


def test_damaged_current_release_falls_back_to_the_one_before_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    release = stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    shutil.rmtree(stage.registry.artifacts.path(release.artifact))
    stage.look()
    stage.look()
    assert serving(stage) == "r1"
    assert stage.outcomes() == [("r2", "refused"), ("r1", "swapped_in")]


def test_swap_waits_for_running_answers_and_is_tried_again_after_its_bound(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, drain_bound_s=0.05)
        await stage.swapper.look()
        stage.publish("r2", stage.folder("second", seed=2))
        async with stage.gate.reading():
            await stage.swapper.look()
            assert serving(stage) == "r1" and stage.outcomes() == [("r1", "swapped_in")]
        await stage.swapper.look()
        assert serving(stage) == "r2"

    asyncio.run(scene())


def test_broken_log_does_not_stop_a_swap(stage: Stage) -> None:
    def broken(events: object) -> None:
        raise OSError("disk full")

    stage.sink.append = broken  # type: ignore[method-assign]
    stage.publish("r2", stage.folder("second", seed=2))
    stage.look()
    assert serving(stage) == "r2"
