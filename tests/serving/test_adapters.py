"""Adapter releases and shares, followed by the swapper on a fake engine."""

import asyncio
import datetime as dt
import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from contracts.events import Stamper
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving.adapters import AdapterOptions
from serving.gate import Gate
from serving.swap import EngineFailed, SwapOptions, WeightSwapper
from tests import tiny_adapters, tiny_models
from tests.fakes import FakeEngine, MemorySink
from tests.serving.bad_adapters import BAD_ADAPTERS, BadAdapter

_ASIDE = tempfile.TemporaryDirectory()


@functools.cache
def saved(seed: int) -> Path:
    return tiny_models.save(Path(_ASIDE.name) / str(seed), seed, tied=False)


@functools.cache
def adapted(seed: int) -> Path:
    return tiny_adapters.save(Path(_ASIDE.name) / f"adapter{seed}", seed, saved(1))


class Stage:
    """A registry with the whole releases r1, which is served, and w2, which is not."""

    def __init__(
        self, root: Path, most: int = 2, max_rank: int = 16, drain_bound_s: float = 5
    ) -> None:
        self.root = root
        self.registry = ReleaseRegistry(root / "registry")
        self.engine, self.sink, self.gate = FakeEngine(), MemorySink(), Gate()
        self.swapper = WeightSwapper(
            self.engine,
            self.registry,
            self.gate,
            self.sink,
            Stamper("test", clock=lambda: 0.0),
            SwapOptions(
                poll_s=0.02,
                drain_bound_s=drain_bound_s,
                adapters=AdapterOptions(most, max_rank),
            ),
        )
        self.publish("w2", self.registry.artifacts.put("policy", saved(2)))
        self.publish("r1", self.registry.artifacts.put("policy", saved(1)))

    def publish(self, release_id: str, artifact: str, base: str | None = None) -> Release:
        release = Release(
            id=release_id,
            model="tiny",
            created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            artifact=artifact,
            base=base,
            canary=Canary(token_ids=(1, 2, 3), logprobs=(0.0, 0.0)),
            parent="r1" if base else None,
            code_version="test",
        )
        self.registry.publish(release)
        return release

    def adapter(self, release_id: str, seed: int, over: str = "r1") -> Release:
        digest = self.registry.artifacts.put("adapter", adapted(seed))
        return self.publish(release_id, digest, base=self.registry.get(over).artifact)

    def look(self, *, again: bool = False) -> None:
        asyncio.run(self.swapper.look(again=again))

    def serving(self) -> tuple[str, str]:
        """The release that serves, and the one whose weights run."""
        swapper, engine = self.swapper, self.engine
        assert swapper.serving is not None and swapper.base is not None
        assert engine.running is not None and engine.running.name == swapper.base.artifact
        loaded = {name: release.artifact for name, release in swapper.adapters.loaded.items()}
        assert {name: folder.name for name, folder in engine.adapters.items()} == loaded
        assert swapper.serving.id in swapper.loaded
        return swapper.serving.id, swapper.base.id

    def outcomes(self) -> list[tuple[str, str]]:
        return [(change.release, change.outcome) for change in self.swapper.changes]

    def reason(self) -> str:
        return self.swapper.changes[-1].reason or ""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path)
    stage.look()
    return stage


def test_adapter_is_served_beside_its_base_without_a_pause(stage: Stage) -> None:
    stage.adapter("r2", seed=2)
    stage.look()
    assert stage.serving() == ("r2", "r1") and list(stage.swapper.loaded) == ["r1", "r2"]
    last = stage.swapper.changes[-1]
    assert (last.outcome, last.drain_ms, last.pause_ms, last.cut_short) == ("swapped_in", 0, 0, 0)
    assert stage.engine.swaps == stage.engine.stagings == 0
    said = stage.sink.release_changes()[-1]
    assert (said.release_id, said.transition) == ("r2", pb.RELEASE_TRANSITION_SWAPPED_IN)


def test_switch_waits_for_no_answer_and_each_keeps_its_adapter(stage: Stage) -> None:
    async def scene() -> None:
        stage.adapter("r2", seed=2)
        await stage.swapper.look()
        async with asyncio.timeout(5), stage.gate.reading():  # an answer that goes on
            stage.adapter("r3", seed=3)
            await stage.swapper.look()
            assert stage.serving() == ("r3", "r1")
            stage.registry.rollback()
            await stage.swapper.look()
            assert stage.serving() == ("r1", "r1")
        assert list(stage.engine.adapters) == ["r2", "r3"]

    asyncio.run(scene())


def test_going_back_to_a_loaded_adapter_reads_nothing(stage: Stage) -> None:
    second = stage.adapter("r2", seed=2)
    stage.look()
    stage.adapter("r3", seed=3)
    stage.look()
    shutil.rmtree(stage.registry.artifacts.path(second.artifact))
    stage.registry.swap_to("r2")
    stage.look()
    assert stage.serving() == ("r2", "r1") and stage.outcomes()[-1] == ("r2", "swapped_in")


# A link is followed when a folder is stored.
STORABLE = [bad for bad in BAD_ADAPTERS if bad.kind != "link"]


@pytest.mark.parametrize("bad", STORABLE, ids=lambda bad: f"{bad.kind}-{bad.name}")
def test_bad_adapter_is_refused_once_and_the_one_before_goes_on(
    stage: Stage, bad: BadAdapter
) -> None:
    stage.adapter("r2", seed=2)
    stage.look()
    folder = shutil.copytree(adapted(3), stage.root / "bad")
    bad.spoil(folder)
    digest = stage.registry.artifacts.put("adapter", folder)
    stage.publish("r3", digest, base=stage.registry.get("r1").artifact)
    stage.look()
    stage.look()
    assert stage.serving() == ("r2", "r1")
    assert stage.outcomes()[1:] == [("r2", "swapped_in"), ("r3", "refused")]
    assert bad.says in stage.reason()


def test_adapter_whose_bytes_changed_in_the_store_is_refused(stage: Stage) -> None:
    release = stage.adapter("r2", seed=2)
    file = stage.registry.artifacts.path(release.artifact) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    stage.look()
    assert stage.serving() == ("r1", "r1") and "expected sha256" in stage.reason()


def test_adapter_that_fails_its_canary_is_unloaded_again(stage: Stage) -> None:
    release = stage.adapter("r2", seed=2)
    stage.engine.says[release.artifact] = [0.0, 0.02]
    stage.look()
    assert stage.serving() == ("r1", "r1") and stage.engine.adapters == {}
    assert "canary: expected" in stage.reason()
    stage.engine.says.clear()
    stage.look(again=True)
    assert stage.serving() == ("r2", "r1")


def test_adapter_that_the_engine_does_not_take_is_refused(stage: Stage) -> None:
    stage.engine.staging_error = "out of memory"
    stage.adapter("r2", seed=2)
    stage.look()
    assert stage.serving() == ("r1", "r1") and stage.reason() == "out of memory"


def test_adapter_of_other_weights_is_refused_with_what_it_adapts(stage: Stage) -> None:
    stage.adapter("r2", seed=2, over="w2")
    stage.look()
    assert stage.serving() == ("r1", "r1")
    other = stage.registry.get("w2").artifact
    assert "of r1, which is served" in stage.reason() and other in stage.reason()


@pytest.mark.parametrize(("base", "kind"), [(True, "policy"), (False, "adapter")])
def test_artifact_of_the_wrong_kind_is_refused(stage: Stage, base: bool, kind: str) -> None:
    digest = stage.registry.artifacts.put(kind, adapted(2))
    stage.publish("r2", digest, base=stage.registry.get("r1").artifact if base else None)
    stage.look()
    assert stage.serving() == ("r1", "r1")
    assert f"expected an artifact of kind {'adapter' if base else 'policy'}" in stage.reason()


def test_server_without_room_for_adapters_refuses_them(tmp_path: Path) -> None:
    stage = Stage(tmp_path, most=0)
    stage.look()
    stage.adapter("r2", seed=2)
    stage.look()
    assert stage.serving() == ("r1", "r1") and "max_adapters is 0" in stage.reason()


def test_whole_release_is_swapped_in_and_drops_the_adapters_of_the_weights_before(
    stage: Stage,
) -> None:
    stage.adapter("r2", seed=2)
    stage.look()
    stage.registry.swap_to("w2")
    stage.look()
    assert stage.serving() == ("w2", "w2") and stage.engine.adapters == {}
    assert stage.swapper.standby is not None and stage.swapper.standby.id == "r1"
    stage.registry.swap_to("r2")
    stage.look()
    assert stage.serving() == ("w2", "w2") and "of w2, which is served" in stage.reason()
    for release_id in ("r1", "r2"):
        stage.registry.swap_to(release_id)
        stage.look()
    assert stage.serving() == ("r2", "r1") and stage.engine.stagings == 1


def test_whole_release_that_fails_its_canary_leaves_the_adapter_serving(stage: Stage) -> None:
    stage.adapter("r2", seed=2)
    stage.look()
    stage.engine.says[stage.registry.get("w2").artifact] = [0.0, 1.0]
    stage.registry.swap_to("w2")
    stage.look()
    assert stage.serving() == ("r2", "r1") and stage.outcomes()[-1] == ("w2", "rolled_back")


def test_server_starts_on_an_adapter_and_its_base(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.adapter("r2", seed=2)
    stage.look()
    assert stage.serving() == ("r2", "r1") and stage.outcomes() == [("r2", "swapped_in")]


def test_server_that_finds_its_adapter_bad_starts_on_the_release_before_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_rank=2)
    stage.adapter("r2", seed=2)
    stage.look()
    assert stage.serving() == ("r1", "r1")
    assert stage.outcomes() == [("r2", "refused"), ("r1", "swapped_in")]


def test_oldest_adapter_makes_room_once_its_last_answer_has_ended(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, most=1)
        await stage.swapper.look()
        second = stage.adapter("r2", seed=2)
        await stage.swapper.look()
        stage.adapter("r3", seed=3)
        with stage.swapper.adapters.answering(second) as adapter:
            assert adapter == "r2"
            await stage.swapper.look()  # there is room for one that comes in
            assert stage.serving() == ("r3", "r1")
            stage.adapter("r4", seed=4)
            looking = asyncio.create_task(stage.swapper.look())
            await asyncio.sleep(0.3)
            assert not looking.done() and "r2" in stage.engine.adapters
            assert list(stage.swapper.loaded) == ["r1", "r3"]  # it gets no new answers
            assert stage.swapper.serving is not None and stage.swapper.serving.id == "r3"
        await looking
        assert stage.serving() == ("r4", "r1") and list(stage.engine.adapters) == ["r3", "r4"]

    asyncio.run(scene())


def test_answer_that_runs_on_keeps_its_adapter_and_the_newcomer_out(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, most=1, drain_bound_s=0.1)
        await stage.swapper.look()
        second = stage.adapter("r2", seed=2)
        await stage.swapper.look()
        stage.adapter("r3", seed=3)
        await stage.swapper.look()
        with stage.swapper.adapters.answering(second):
            stage.adapter("r4", seed=4)
            await stage.swapper.look()
        assert "max_adapters: expected room within 0.1 s" in stage.reason()
        assert stage.serving() == ("r3", "r1") and "r2" in stage.swapper.loaded

    asyncio.run(scene())


def test_target_without_room_is_tried_again_when_shares_change(tmp_path: Path) -> None:
    stage = Stage(tmp_path, most=1)
    stage.look()
    for seed in (2, 3):
        stage.registry.pin("r1")
        stage.adapter(f"r{seed}", seed=seed)
        stage.registry.share(f"r{seed}", 0.1)
        stage.look()
    stage.adapter("r4", seed=4)
    stage.registry.pin("r4")
    stage.look()
    assert stage.serving() == ("r1", "r1") and stage.outcomes()[-1] == ("r4", "refused")
    stage.registry.share("r2", 0)
    stage.look()
    stage.look()
    assert stage.serving() == ("r4", "r1")


def test_engine_that_dies_while_an_adapter_is_loaded_ends_the_swapper(stage: Stage) -> None:
    stage.adapter("r2", seed=2)
    stage.engine.staging_error, stage.engine.broken = "connection lost", "killed"
    with pytest.raises(EngineFailed, match="killed"):
        stage.look()


def test_release_with_a_share_is_loaded_and_answers_its_people(stage: Stage) -> None:
    stage.adapter("r2", seed=2)
    stage.look()
    stage.registry.pin("r2")
    stage.adapter("r3", seed=3)
    people = [f"user-{i}" for i in range(300)]

    def counted() -> dict[str, int]:
        taken = [stage.swapper.release_for(person) for person in people]
        assert None not in taken
        return {name: sum(r is not None and r.id == name for r in taken) for name in ("r1", "r3")}

    assert counted() == {"r1": 0, "r3": 0}
    stage.registry.share("r3", 0.3)
    stage.registry.share("r1", 0.2)  # the base itself
    assert counted() == {"r1": 0, "r3": 0}
    stage.look()
    assert stage.serving() == ("r2", "r1") and stage.outcomes()[-1] == ("r3", "loaded")
    assert stage.sink.release_changes()[-1].transition == pb.RELEASE_TRANSITION_LOADED
    # Five standard deviations of a binomial count.
    assert abs(counted()["r3"] - 90) < 40 and abs(counted()["r1"] - 60) < 35
    stage.registry.share("r3", 0)
    stage.look()
    assert counted()["r3"] == 0 and "r3" in stage.swapper.loaded  # by name


def test_release_with_a_share_that_cannot_be_loaded_leaves_its_people_to_what_is_served(
    stage: Stage,
) -> None:
    stage.registry.share("w2", 1)
    stage.look()
    stage.look()
    answering = stage.swapper.release_for("ann")
    assert answering is not None and answering.id == "r1"
    assert stage.outcomes()[1:] == [("w2", "refused")]
    assert "release.base: expected" in stage.reason()


def test_shares_that_cannot_be_read_stay_as_they_were(stage: Stage) -> None:
    stage.adapter("r2", seed=2)
    stage.registry.share("r1", 1)
    stage.look()
    (stage.registry.root / "shares.json").write_text("{")
    stage.look()
    answering = stage.swapper.release_for("ann")
    assert answering is not None and (answering.id, stage.serving()[0]) == ("r1", "r2")


def test_more_shares_than_there_is_room_for_are_refused_by_name(tmp_path: Path) -> None:
    stage = Stage(tmp_path, most=1)
    stage.look()
    for seed in (2, 3, 4):
        stage.registry.pin("r1")
        stage.adapter(f"r{seed}", seed=seed)
        stage.registry.share(f"r{seed}", 0.1)
        stage.look()
    assert list(stage.swapper.loaded) == ["r1", "r2", "r3"]
    assert "max_adapters: expected at least 2" in stage.reason()
    assert stage.outcomes()[-1] == ("r4", "refused")
