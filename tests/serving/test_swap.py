import asyncio
import datetime as dt
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from contracts.events import Stamper
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from serving.gate import CutShort, Gate
from serving.swap import EngineFailed, SwapOptions, WeightSwapper
from tests import tiny_models
from tests.fakes import FakeEngine, MemorySink
from tests.serving.bad_releases import BAD, Bad


@functools.cache
def model_folder(seed: int) -> Path:
    """Saved once for all tests, below a folder that ends with the process."""
    return tiny_models.save(Path(_ASIDE.name) / str(seed), seed, tied=False)


_ASIDE = tempfile.TemporaryDirectory()


class Stage:
    """A registry with a first release served by a fake engine, and what it takes to publish
    another.
    """

    def __init__(self, aside: Path, root: Path | None = None, **options: Any) -> None:
        self.aside = aside
        self.registry = ReleaseRegistry((root or aside) / "registry")
        self.engine, self.sink, self.gate = FakeEngine(), MemorySink(), Gate()
        self.swapper = WeightSwapper(
            self.engine,
            self.registry,
            self.gate,
            self.sink,
            Stamper("test", clock=lambda: 0.0),
            SwapOptions(**{"poll_s": 0.02, "drain_bound_s": 5, **options}),
        )
        self.publish("r1", self.folder("first", seed=1))

    def folder(self, name: str, seed: int) -> Path:
        return shutil.copytree(model_folder(seed), self.aside / name)

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
    assert stage.engine.swaps == 1
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


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.kind}-{bad.name}")
def test_bad_release_is_refused_once_with_its_reason(stage: Stage, bad: Bad) -> None:
    folder = stage.folder("second", seed=2)
    good = stage.publish("r2", folder)
    release_id = bad.publish(stage.registry, folder, good, stage.aside / "bad")
    stage.look()
    stage.look()
    assert serving(stage) == "r1" and stage.engine.swaps in (0, 2)
    last = stage.swapper.changes[-1]
    wanted = "rolled_back" if stage.engine.swaps else "refused"
    assert stage.outcomes() == [("r1", "swapped_in"), (release_id, wanted)]
    assert bad.says in (last.reason or "")
    assert stage.sink.release_changes()[-1].release_id == release_id
    stage.registry.swap_to("r2")
    stage.look()
    assert serving(stage) == "r2"


def test_there_are_fifty_bad_releases_of_ten_kinds() -> None:
    assert len({bad.name for bad in BAD}) >= 50 and len({bad.kind for bad in BAD}) >= 10


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


def test_answers_go_on_while_a_release_is_staged(stage: Stage) -> None:
    async def scene() -> None:
        stage.engine.may_stage.clear()
        stage.publish("r2", stage.folder("second", seed=2))
        looking = asyncio.create_task(stage.swapper.look())
        while stage.swapper.state != "staging":
            await asyncio.sleep(0)
        async with asyncio.timeout(1), stage.gate.reading():
            assert serving(stage) == "r1"
        stage.engine.may_stage.set()
        await looking
        assert serving(stage) == "r2"

    asyncio.run(scene())


def test_swap_waits_for_running_answers_and_ends_those_that_run_on(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, drain_bound_s=0.2)
        await stage.swapper.look()
        stage.publish("r2", stage.folder("second", seed=2))

        async def answer(seconds: float) -> str:
            async with stage.gate.reading():
                await asyncio.sleep(seconds)
                return serving(stage)

        quick, slow = asyncio.create_task(answer(0.1)), asyncio.create_task(answer(60))
        await asyncio.sleep(0)
        await stage.swapper.look()
        assert await quick == "r1" and serving(stage) == "r2"
        with pytest.raises(CutShort):
            await slow
        change = stage.swapper.changes[-1]
        assert change.cut_short == 1 and change.drain_ms >= 200

    asyncio.run(scene())


def test_swap_whose_prefix_cache_is_not_forgotten_changes_nothing(stage: Stage) -> None:
    stage.publish("r2", stage.folder("second", seed=2))
    stage.engine.cache_kept = True
    stage.look()
    assert serving(stage) == "r1" and stage.engine.swaps == 0
    assert stage.outcomes()[-1] == ("r2", "rolled_back")
    assert "prefix cache" in (stage.swapper.changes[-1].reason or "")


def test_engine_that_hangs_with_the_gate_closed_is_given_up(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, exchange_bound_s=0.05)
        await stage.swapper.look()
        stage.publish("r2", stage.folder("second", seed=2))
        stage.engine.may_swap.clear()
        with pytest.raises(EngineFailed, match="TimeoutError"):
            await stage.swapper.look()
        assert stage.swapper.serving is None
        async with asyncio.timeout(1), stage.gate.reading():  # who waits is told, not held
            pass

    asyncio.run(scene())


def test_engine_that_dies_while_a_swap_waits_ends_the_swapper(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path)
        await stage.swapper.look()
        stage.publish("r2", stage.folder("second", seed=2))
        stage.engine.may_stage.clear()
        running = asyncio.create_task(stage.swapper.run())
        while stage.swapper.state != "staging":
            await asyncio.sleep(0)
        stage.engine.broken = "killed"
        async with asyncio.timeout(5):
            with pytest.raises(EngineFailed, match="killed"):
                await running
        assert stage.outcomes() == [("r1", "swapped_in")]

    asyncio.run(scene())


def test_going_back_takes_the_weights_from_memory(stage: Stage) -> None:
    first = stage.registry.get("r1")
    stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.look()
    shutil.rmtree(stage.registry.artifacts.path(first.artifact))  # nothing is read any more
    stage.registry.rollback()
    stage.look()
    assert serving(stage) == "r1" and stage.engine.stagings == 1
    stage.registry.swap_to("r2")
    stage.look()
    assert serving(stage) == "r2" and stage.engine.stagings == 1


def test_previous_weights_are_freed_where_memory_is_short(tmp_path: Path) -> None:
    stage = Stage(tmp_path, keep_previous=False)
    stage.look()
    stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.look()
    assert stage.engine.staged is None
    stage.registry.rollback()
    stage.look()
    assert serving(stage) == "r1" and stage.engine.stagings == 2


def test_refused_release_is_tried_again_when_somebody_asks(stage: Stage) -> None:
    stage.engine.staging_error = "out of memory"
    stage.publish("r2", stage.folder("second", seed=2))
    stage.look()
    stage.engine.staging_error = None
    stage.look()
    assert serving(stage) == "r1"
    asyncio.run(stage.swapper.look(again=True))
    assert serving(stage) == "r2"


def test_first_release_that_fails_its_canary_falls_back_to_the_one_before_it(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    release = stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.engine.says[release.artifact] = [0.0, 1.0]
    stage.look()
    assert serving(stage) == "r1"
    assert stage.outcomes() == [("r2", "refused"), ("r1", "swapped_in")]


def test_engine_that_ends_with_its_server_while_it_loads_is_no_fault_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As both do where their process group is told to end."""
    stage, ended = Stage(tmp_path, poll_s=60), asyncio.Event()

    async def start(folder: Path, model: str) -> None:
        ended.set()
        raise RuntimeError("the engine has stopped")

    async def scene() -> None:
        running = asyncio.create_task(stage.swapper.run())
        await ended.wait()
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    monkeypatch.setattr(stage.engine, "start", start)
    asyncio.run(scene())
    assert stage.outcomes() == [] and stage.sink.release_changes() == []


def test_no_release_that_can_be_served_ends_the_swapper(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (stage.registry.artifacts.path(stage.registry.get("r1").artifact) / "config.json").unlink()
    with pytest.raises(EngineFailed, match="no release"):
        stage.look()


def test_pinned_release_stays_whatever_is_published(stage: Stage) -> None:
    stage.registry.pin("r1")
    stage.publish("r2", stage.folder("second", seed=2), parent="r1")
    stage.look()
    assert serving(stage) == "r1"
    stage.registry.unpin()
    stage.look()
    assert serving(stage) == "r2"


def test_one_replica_drains_at_a_time(tmp_path: Path) -> None:
    async def scene() -> None:
        stages = [Stage(tmp_path / name, root=tmp_path / "shared") for name in ("a", "b")]
        for stage in stages:
            await stage.swapper.look()
        stages[0].publish("r2", stages[0].folder("second", seed=2))
        async with stages[0].gate.reading():
            looks = [asyncio.create_task(stage.swapper.look()) for stage in stages]
            while {"swapping", "waiting"} != {stage.swapper.state for stage in stages}:
                await asyncio.sleep(0)
            waiting = next(stage for stage in stages if stage.swapper.state == "waiting")
            async with asyncio.timeout(1), waiting.gate.reading():
                assert serving(waiting) == "r1"
            if waiting is stages[0]:  # the other one had nothing to wait for
                await looks[1]
        await asyncio.gather(*looks)
        assert [serving(stage) for stage in stages] == ["r2", "r2"]

    asyncio.run(scene())


def test_release_that_is_rolled_back_while_others_drain_is_not_swapped_in(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path)
        await stage.swapper.look()
        turn = stage.registry.rollout.take_turn()
        assert turn is not None
        stage.publish("r2", stage.folder("second", seed=2), parent="r1")
        looking = asyncio.create_task(stage.swapper.look())
        while stage.swapper.state != "waiting":
            await asyncio.sleep(0)
        stage.registry.rollback()
        await looking
        turn.close()
        await stage.swapper.look()
        assert serving(stage) == "r1" and stage.engine.swaps == 0
        assert stage.engine.staged is None

    asyncio.run(scene())


def test_registry_that_cannot_be_read_for_a_while_ends_no_server(stage: Stage) -> None:
    async def scene() -> None:
        current = stage.registry.root / "current"
        aside = current.rename(current.with_name("aside"))
        current.mkdir()  # reading it is an OSError, as of a disk elsewhere that is away
        running = asyncio.create_task(stage.swapper.run())
        await asyncio.sleep(0.2)
        assert not running.done() and serving(stage) == "r1"
        current.rmdir()
        aside.rename(current)
        stage.publish("r2", stage.folder("second", seed=2), parent="r1")
        async with asyncio.timeout(10):
            while serving(stage) != "r2":
                await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scene())


def test_broken_log_does_not_stop_a_swap(stage: Stage) -> None:
    def broken(events: object) -> None:
        raise OSError("disk full")

    stage.sink.append = broken  # type: ignore[method-assign]
    stage.publish("r2", stage.folder("second", seed=2))
    stage.look()
    assert serving(stage) == "r2"
