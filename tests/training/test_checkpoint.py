"""A stage that is killed, or whose disk is full, goes on and ends where an undisturbed one ends."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from contracts.errors import CorruptArtifact, InvalidInput
from tests.training.letters import (
    GROUPS,
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
    two_tastes,
)
from training.checkpoint import Checkpoint
from training.config import AdaptableConfig, LoraConfig, PpoConfig, RewardModelConfig, SftConfig
from training.data import Order
from training.metrics import Metrics, read_metrics
from training.ppo import train_ppo
from training.reward_model import train_reward_model
from training.sft import train_sft

# All that a stage can carry is in use: dropout, the pretraining mix, a moving beta, an average.
SFT = SftConfig(
    epochs=2, batch=8, learning_rate=1e-3, pretraining_row_tokens=16, checkpoint_every=2
)
REWARD = RewardModelConfig(epochs=2, prompts_per_batch=8, learning_rate=1e-3, checkpoint_every=2)
PPO = PpoConfig(
    episodes=128,
    batch=32,
    minibatch=16,
    policy_rate=1e-3,
    value_rate=1e-3,
    kl_controller="adaptive",
    kl_horizon=100,
    ptx_examples_per_episode=1,
    ptx_row_tokens=16,
    ema=0.5,
    max_response_tokens=8,
    checkpoint_every=2,
)
AHEAD = PPO.model_copy(
    update={
        "advantage": "rloo",
        "samples_per_prompt": 4,
        "overlap": True,
        "importance_cap": 2.0,
    }
)
# Without threads that a fork would lose: its children come from a process that only imported.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


LORA = LoraConfig(rank=2, alpha=4)


def sft(world: World, folder: Path, metrics: Metrics, config: SftConfig = SFT) -> None:
    texts = documents(20, seed=20)
    train_sft(config, world.base, demonstrations(24, 5), [], folder, metrics, texts)


def reward_model(
    world: World, folder: Path, metrics: Metrics, config: RewardModelConfig = REWARD
) -> None:
    rows, zero = rankings(24, seed=3), demonstrations(8, seed=4)
    train_reward_model(config, world.sft, rows, zero, folder, metrics)


def grouped(world: World, folder: Path, metrics: Metrics) -> None:
    config = REWARD.model_copy(update={"epochs": 1, "prompts_per_batch": 40, "groups": GROUPS})
    rows, zero = two_tastes(240, seed=3), demonstrations(8, seed=4)
    train_reward_model(config, world.sft, rows, zero, folder, metrics)


def ppo(world: World, folder: Path, metrics: Metrics, config: PpoConfig = PPO) -> None:
    sampler: Any = TorchSampler(world.sft)
    texts = documents(60, seed=20)
    train_ppo(config, world.sft, world.reward, prompts(40), texts, sampler, folder, metrics)


def ahead(world: World, folder: Path, metrics: Metrics) -> None:
    ppo(world, folder, metrics, AHEAD)


Stage = Callable[[World, Path, Metrics], None]
Disturb = Callable[[], None]


def in_process(stage: Stage, world: World, folder: Path, disturb: Disturb, after: int) -> None:
    """What a child runs: `disturb` comes right after the optimizer's step of this number."""
    torch.set_num_threads(1)
    steps = count(1)
    register_optimizer_step_post_hook(lambda *_: disturb() if next(steps) == after else None)
    with closing(Metrics(folder.with_name("metrics"))) as metrics:
        stage(world, folder, metrics)


def start(
    stage: Stage, world: World, folder: Path, disturb: Disturb | None = None, after: int = 0
) -> int:
    """Run in a process of its own; its exit code, a signal's negative."""
    child = CONTEXT.Process(target=in_process, args=(stage, world, folder, disturb, after))
    child.start()
    child.join(120)
    code = child.exitcode
    child.kill()
    child.join()
    child.close()
    assert code is not None, "still running after two minutes"
    return code


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    """No file grows beyond this from now on: the system refuses to write on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def killed_while_writing() -> None:
    """The same, and the system kills who tries: 100,000 bytes into the next checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    full_disk()


def adapted(stage: Callable[..., None], config: AdaptableConfig) -> Stage:
    return partial(stage, config=config.model_copy(update={"lora": LORA}))


def files_of(folder: Path) -> dict[str, bytes]:
    """What was saved, and the adapter beside it."""
    beside = folder.with_name(f"{folder.name}.lora").glob("adapter/*")
    return {f.name: f.read_bytes() for f in (*folder.glob("*.safetensors"), *beside)}


def assert_same(folder: Path, other: Path) -> None:
    assert files_of(folder) == files_of(other) != {}
    rows = [read_metrics(f.parent / "metrics") for f in (folder, other)]
    assert rows[0] == rows[1] != []


@pytest.mark.parametrize(
    ("stage", "kills", "steps"),
    [
        # Steps of the optimizers: before the first checkpoint, between two, right before one.
        (sft, (1, 3, 2), 6),
        (reward_model, (1, 3, 2), 6),
        (grouped, (3,), 6),
        # Four in each of four iterations; the third kill is within a minibatch.
        (ppo, (2, 12, 5), 16),
        # Two in each of four: without a value network, and with the next rollout in flight.
        (ahead, (1, 6, 3), 8),
        (adapted(sft, SFT), (3,), 6),
        (adapted(reward_model, REWARD), (3,), 6),
        (adapted(ppo, PPO), (12,), 16),
        (adapted(ppo, AHEAD), (6,), 8),
    ],
    ids=[
        *("sft", "reward", "groups", "ppo", "ahead"),
        *("sft-lora", "reward-lora", "ppo-lora", "ahead-lora"),
    ],
)
def test_killed_at_any_step_a_stage_ends_with_the_same_weights(
    stage: Stage, kills: tuple[int, ...], steps: int, world: World, tmp_path: Path
) -> None:
    peace, disturbed = tmp_path / "peace/model", tmp_path / "killed/model"
    assert start(stage, world, peace) == 0
    for after in kills:
        assert start(stage, world, disturbed, killed, after) == -signal.SIGKILL
        assert not disturbed.exists()
    # It did not begin anew, or it would have been killed at its last step.
    assert start(stage, world, disturbed, killed, steps) == 0
    assert_same(disturbed, peace)


@pytest.mark.parametrize(
    ("disturb", "code"), [(full_disk, 1), (killed_while_writing, -signal.SIGXFSZ)]
)
def test_what_goes_wrong_while_saving_leaves_the_last_checkpoint(
    disturb: Disturb, code: int, world: World, tmp_path: Path
) -> None:
    peace, disturbed = tmp_path / "peace/model", tmp_path / "disturbed/model"
    assert start(sft, world, peace) == 0
    # The checkpoint of step 2 is whole, that of step 4 fails.
    assert start(sft, world, disturbed, disturb, 3) == code
    whole = disturbed.parent / "checkpoint/model/2"
    assert (whole / "__0_0.distcp").stat().st_size > 100_000
    # A kill leaves the part that was written, which the next one replaces.
    left = {"2"} if code == 1 else {"2", ".4"}
    assert {p.name for p in whole.parent.iterdir()} == left
    assert start(sft, world, disturbed, killed, 6) == 0
    assert_same(disturbed, peace)


def test_a_full_disk_is_an_error_that_names_the_checkpoint(tmp_path: Path) -> None:
    model, config = torch.nn.Linear(100, 100), SftConfig(checkpoint_every=1)
    checkpoint = Checkpoint(tmp_path / "a", config, [], {"model": model})
    checkpoint.save(1)
    before = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint/a/2: not written"):
            checkpoint.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.restore() == 1
    assert torch.equal(model.weight, before)


def test_only_the_last_checkpoint_stays(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a", SftConfig(checkpoint_every=1), [], {})
    for done in (8, 9, 10):
        checkpoint.save(done)
    assert [p.name for p in checkpoint.saved()] == ["10"]
    # Killed between the new one's appearance and the old ones' end.
    (tmp_path / "checkpoint/a/9").mkdir()
    assert checkpoint.restore() == 10
    checkpoint.save(11)
    assert [p.name for p in checkpoint.saved()] == ["11"]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    config = SftConfig(checkpoint_every=1)
    Checkpoint(tmp_path / "a", config, [], {}).save(1)
    drawn = torch.rand(3)
    assert Checkpoint(tmp_path / "a", config, [], {}).restore() == 1
    assert torch.equal(torch.rand(3), drawn)


def test_saved_every_so_many_steps_or_never(tmp_path: Path) -> None:
    for name, every in (("a", 3), ("b", 0)):
        for done in range(1, 6):
            config = SftConfig(checkpoint_every=every)
            Checkpoint(tmp_path / name, config, [], {}).save(done)
    assert Checkpoint(tmp_path / "a", SftConfig(checkpoint_every=3), [], {}).restore() == 3
    assert Checkpoint(tmp_path / "b", SftConfig(checkpoint_every=0), [], {}).restore() == 0


def test_a_checkpoint_of_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    config = SftConfig(checkpoint_every=1)
    Checkpoint(tmp_path / "a", config, [1], {}).save(1)
    for other, data in ((config, [2]), (SftConfig(checkpoint_every=1, batch=8), [1])):
        with pytest.raises(InvalidInput, match=r"checkpoint/a/1: expected .*start over"):
            Checkpoint(tmp_path / "a", other, data, {}).restore()


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    config = SftConfig(checkpoint_every=1)
    checkpoint = Checkpoint(tmp_path / "a", config, [], {})
    checkpoint.save(1)
    for file in (tmp_path / "checkpoint/a/1").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptArtifact, match="delete it to start over"):
            checkpoint.restore()
        file.write_bytes(whole)


def test_an_order_goes_on() -> None:
    order, again = Order(5, seed=1), Order(5, seed=1)
    first = order.take(7)
    assert sorted(first[:5]) == list(range(5))
    again.take(2)
    again.load_state_dict(order.state_dict())
    assert again.take(9) == order.take(9)
