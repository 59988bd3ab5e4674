"""Engines in processes of their own: who draws what, on which weights, and how it ends."""

import os
import random
import signal
import threading
import time
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from contracts.errors import InvalidInput
from tests.training.fake_engine import FakeEngine, Slow, Unstartable
from tests.training.letters import World, documents, prompts
from tests.training.test_checkpoint import assert_same, killed, start
from tests.training.test_ranks import AHEAD, on_ranks
from tests.training.test_rollout import PROMPTS, mismatch
from training import ranks
from training.config import PpoConfig
from training.engines import EngineFailed, Engines, environments, visible_cards
from training.metrics import Metrics
from training.model import load_policy
from training.ppo import train_ppo
from training.rollout import Sampler

IDS = [[5, 6], [7], [8, 9, 10], [11], [12]]
STATE = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor(3)}
OTHER = {"w": torch.tensor([1.0, 2.5]), "v": torch.tensor(3)}


def ended(pid: int) -> bool:
    """Also where whoever got the orphan has not buried it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pids(engines: Engines) -> list[int]:
    return [int(process._process.pid or 0) for process in engines._processes]


def gone(started: list[int]) -> bool:
    """Whether they end, which takes no time but the system's."""
    assert started
    deadline = time.monotonic() + 60
    while not all(map(ended, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(map(ended, started))


def test_two_engines_draw_what_one_would_and_on_the_weights_that_were_asked_for() -> None:
    draw = random.Random(4)
    seeds, found = [draw.getrandbits(62) for _ in IDS], []
    with closing(Engines(2, FakeEngine)) as two:
        for state in (STATE, OTHER, STATE):
            one = FakeEngine()
            one.load(state)
            two.load(state)
            drawn: Any = two.sample(IDS, 8, seed=4, samples=3)
            assert drawn == one.sample(IDS, 8, seeds, 3)
            found.append(drawn)
        assert found[0] == found[2] != found[1]
        assert two.sample(IDS, 8, seed=5, samples=3) != found[2]
        assert two.sample([], 8, seed=4) == []

        straggler = two._processes[1]
        straggler.ask("label", (2,))
        straggler.answer()
        assert len(two.sample(IDS[:1], 8, seed=4)) == 1  # the other one's
        started = pids(two)
        with pytest.raises(EngineFailed, match="engine 1 drew on weights 2, asked were 3"):
            two.sample(IDS, 8, seed=4)
        assert all(map(ended, started))
        with pytest.raises(EngineFailed, match="have ended"):
            two.sample(IDS, 8, seed=4)


def test_what_an_engine_raises_is_heard_with_its_text() -> None:
    with pytest.raises(EngineFailed, match="engine 0: ValueError: no such model") as failed:
        Engines(1, Unstartable)
    assert "fake_engine.py" in failed.value.__notes__[0]


@pytest.mark.parametrize("count", [1, 2], ids=["idle", "drawing"])
def test_an_engine_that_died_is_named_and_takes_the_others_along(count: int) -> None:
    with closing(Engines(count, Slow)) as engines:
        engines.load(STATE)
        started = pids(engines)
        kill = threading.Timer(0.5 * (count - 1), os.kill, (started[-1], signal.SIGKILL))
        kill.start()
        if count == 1:
            kill.join()
        # The first of two would go on for ten minutes.
        name = rf"engine {count - 1} \(process {started[-1]}\) ended by SIGKILL"
        with pytest.raises(EngineFailed, match=name):
            engines.sample(IDS, 8, seed=1)
        assert all(map(ended, started))


def elsewhere(world: World, folder: Path, metrics: Metrics) -> None:
    scratch = folder.parent / "engines"
    scratch.mkdir(parents=True, exist_ok=True)
    with closing(Engines(1, partial(FakeEngine, scratch))) as engines:
        texts = documents(60, seed=20)
        train_ppo(AHEAD, world.sft, world.reward, prompts(40), texts, engines, folder, metrics)


def test_a_trainer_that_is_killed_leaves_no_engine_and_goes_on_to_the_same_weights(
    world: World, tmp_path: Path
) -> None:
    peace, disturbed = tmp_path / "peace/model", tmp_path / "killed/model"
    assert start(elsewhere, world, peace) == 0
    # Two steps in each of three iterations, while the engine draws for the next one.
    assert start(elsewhere, world, disturbed, killed, 3) == -signal.SIGKILL
    assert gone([int(file.name) for file in (disturbed.parent / "engines").iterdir()])
    assert start(elsewhere, world, disturbed, killed, 6) == 0
    assert_same(disturbed, peace)


def busy(folder: Path) -> None:
    """Killed while its engine draws, which it would go on with for ten minutes."""
    engines = Engines(1, partial(Slow, folder))
    engines.load(STATE)
    threading.Timer(0.2, killed).start()
    engines.sample(IDS, 8, seed=1)


def test_an_engine_that_draws_ends_with_its_trainer(tmp_path: Path) -> None:
    assert on_ranks(1, tmp_path, partial(busy, tmp_path)) == [-signal.SIGKILL]
    assert gone([int(file.name) for file in tmp_path.iterdir()])


def parts_of_ranks() -> None:
    from instructloop.work import _engine

    rank = ranks.rank()
    with pytest.raises(InvalidInput, match=r"ppo.engines: expected a multiple of the 2 ranks, got"):
        _engine(PpoConfig(engines=3), Path("nowhere"))
    # As cards_for has it on a machine of six.
    seen = [("a", "b")[rank], *"cdef"]
    assert environments(4, seen) == [{"CUDA_VISIBLE_DEVICES": card} for card in ("cd", "ef")[rank]]
    with pytest.raises(InvalidInput, match=r"ppo.engines: expected at most 4, .*, got 6"):
        environments(6, seen)
    with closing(Engines(2, FakeEngine)) as engines:
        assert [process.name for process in engines._processes] == [f"engine {rank}"]
        engines.load(STATE)
        assert [len(group) for group in engines.sample(IDS, 8, seed=rank)] == [1] * len(IDS)


def test_each_rank_has_its_part_of_the_engines_and_their_cards_are_after_those_of_the_ranks(
    tmp_path: Path,
) -> None:
    assert on_ranks(2, tmp_path, parts_of_ranks) == [0, 0]


def test_engines_of_a_vllm_for_processors_take_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert visible_cards() == []
    monkeypatch.setattr("training.engines.built_for_processors", lambda: False)
    assert visible_cards() == ["0", "1", "2"]


def test_engines_share_the_threads() -> None:
    threads = len(os.sched_getaffinity(0))
    assert environments(1, []) == [{"OMP_NUM_THREADS": str(threads)}]
    assert environments(99, []) == [{"OMP_NUM_THREADS": "1"}] * 99


class Crash(Exception):
    pass


def learn(
    engines: Engines, world: World, folder: Path, crash_after: int = 0
) -> list[dict[str, float]]:
    steps = count(1)

    def crash(*_: Any) -> None:
        if next(steps) == crash_after:
            raise Crash

    hook = register_optimizer_step_post_hook(crash)
    try:
        with closing(Metrics(folder.with_name("metrics"))) as metrics:
            texts = documents(60, seed=20)
            train_ppo(AHEAD, world.sft, world.reward, prompts(40), texts, engines, folder, metrics)
        return metrics.rows
    finally:
        hook.remove()


@pytest.mark.vllm
def test_vllm_in_two_processes_draws_on_the_trainers_weights_and_learning_is_taken_up_again(
    world: World, tmp_path: Path
) -> None:
    old, new = load_policy(world.base), load_policy(world.sft)
    peace, disturbed = tmp_path / "peace/model", tmp_path / "disturbed/model"
    with closing(Engines(2, partial(Sampler, world.base, 64, transfer=True))) as engines:
        for policy, other in ((new, old), (old, new)):
            engines.load(policy.state_dict())
            drawn = engines.sample(PROMPTS, 24, seed=5, samples=3)
            assert mismatch(policy, drawn) < 1e-4
            assert mismatch(other, drawn) > 1e-2
        assert engines.sample(PROMPTS, 24, seed=5, samples=3) == drawn

        rows = learn(engines, world, peace)
        assert len(rows) == 3
        assert rows[0]["logprob_mismatch_max"] < 1e-4
        with pytest.raises(Crash):
            learn(engines, world, disturbed, crash_after=3)
        learn(engines, world, disturbed)
        assert_same(disturbed, peace)

        # One engine draws the same as two.
        engines.load(old.state_dict())
        engines._processes.pop().end()
        for alone, among in zip(engines.sample(PROMPTS, 24, seed=5, samples=3), drawn, strict=True):
            assert [s.token_ids for s in alone] == [s.token_ids for s in among]
