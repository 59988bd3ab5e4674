"""Training on two ranks is training on one: the same curve, the same weights, each other's
checkpoints.
"""

import copy
import importlib
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, GPT2Config

from tests.training import test_checkpoint
from tests.training.letters import (
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from tests.training.test_checkpoint import (
    CONTEXT,
    REWARD,
    adapted,
    assert_same,
    full_disk,
    grouped,
    killed,
)
from training import ranks
from training.config import PpoConfig, RewardModelConfig, SftConfig
from training.metrics import Metrics, read_metrics
from training.model import load_policy, load_tokenizer, pack_pairs, packed_logprobs, save_policy
from training.optimizer import adam
from training.packing import Tree
from training.ppo import train_ppo
from training.reward_model import train_reward_model
from training.rollout import Sampled
from training.sft import train_sft

# What float32 sums in another order may change: a figure's share, a weight (they move by 1e-2); and
# a figure where bf16 multiplies.
CURVE, WEIGHTS, CURVE_BF16 = 1e-4, 1e-4, 1e-2
# Dropout is drawn by each rank for itself.
SFT = test_checkpoint.SFT.model_copy(update={"dropout": 0.0})
FEW = {"episodes": 48, "batch": 16, "minibatch": 8, "checkpoint_every": 1}
PPO = test_checkpoint.PPO.model_copy(update=FEW)
AHEAD = test_checkpoint.AHEAD.model_copy(update=FEW)


class ByPrompt(TorchSampler):
    """The response to a prompt is the same, whichever rank draws it."""

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        return [super(ByPrompt, self).sample([p], max_tokens, sum(p), samples)[0] for p in prompts]


Stage = Callable[[World, Path, Metrics], None]


def sft(world: World, folder: Path, metrics: Metrics, config: SftConfig = SFT) -> None:
    rows, held_out = demonstrations(24, 5), demonstrations(5, 6)
    train_sft(config, world.base, rows, held_out, folder, metrics, documents(20, seed=20))


def reward(
    world: World,
    folder: Path,
    metrics: Metrics,
    rows: int = 24,
    config: RewardModelConfig = REWARD,
) -> None:
    ranked, zero = rankings(rows, seed=3), demonstrations(8, seed=4)
    train_reward_model(config, world.sft, ranked, zero, folder, metrics)


def ppo(world: World, folder: Path, metrics: Metrics, config: PpoConfig = PPO) -> None:
    sampler: Any = ByPrompt(world.sft)
    texts = documents(60, seed=20)
    train_ppo(config, world.sft, world.reward, prompts(40), texts, sampler, folder, metrics)


def ahead(world: World, folder: Path, metrics: Metrics) -> None:
    ppo(world, folder, metrics, AHEAD)


def one_tree_a_pass(stage: Stage, world: World, folder: Path, metrics: Metrics) -> None:
    """So that all ranks but one have nothing to do in a pass."""
    for name in ("likelihood", "reward_model", "experience"):
        module = importlib.import_module(f"training.{name}")
        setattr(module, "PASS_TOKENS", 1)  # noqa: B010  in a process of its own
    stage(world, folder, metrics)


def run(stage: Stage, world: World, folder: Path) -> None:
    with closing(Metrics(folder.with_name("metrics"))) as metrics:
        stage(world, folder, metrics)


Job = Callable[[], None]
Disturb = tuple[int, Callable[[], None], int]


def as_rank(rank: int, size: int, meet: Path, job: Job, disturb: Disturb | None) -> None:
    """What a child runs: `disturb` is on which rank, what, and after which step of an optimizer."""
    torch.set_num_threads(1)
    steps = count(1)
    if disturb is not None and disturb[0] == rank:
        _, act, after = disturb
        register_optimizer_step_post_hook(lambda *_: act() if next(steps) == after else None)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    job()
    if size > 1:
        dist.destroy_process_group()


def on_ranks(size: int, scratch: Path, job: Job, disturb: Disturb | None = None) -> list[int]:
    """Exit codes, a signal's negative."""
    meet = scratch / "meet"
    meet.unlink(missing_ok=True)
    children: list[BaseProcess] = [
        CONTEXT.Process(target=as_rank, args=(r, size, meet, job, disturb)) for r in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
        child.close()
    assert None not in codes, "still running after two minutes"
    return [code for code in codes if code is not None]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A reward model's bias without its shift: no pair of scores has a gradient for it, Adam makes
    steps of what float32 rounds, and the shift takes them back.
    """
    found = {n: x for f in folder.glob("*.safetensors") for n, x in load_file(f).items()}
    for name in [name for name in found if name.endswith("shift")]:
        found[name.replace("shift", "bias")] -= found.pop(name)
    return found


def assert_close(folder: Path, other: Path) -> None:
    mine, theirs = (read_metrics(f.with_name("metrics")) for f in (folder, other))
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=CURVE, abs=CURVE)
    ours, its = weights_of(folder), weights_of(other)
    assert ours.keys() == its.keys() != set()
    for name, found in ours.items():
        torch.testing.assert_close(found, its[name], atol=WEIGHTS, rtol=0, msg=name)


@pytest.mark.parametrize(
    "stage",
    [
        sft,
        reward,
        grouped,
        ppo,
        ahead,
        adapted(sft, SFT),
        adapted(reward, REWARD),
        adapted(ppo, PPO),
    ],
    ids=["sft", "reward", "groups", "ppo", "ahead", "sft-lora", "reward-lora", "ppo-lora"],
)
def test_curve_and_weights_of_two_ranks_are_those_of_one(
    stage: Stage, world: World, tmp_path: Path
) -> None:
    one, two = tmp_path / "one/model", tmp_path / "two/model"
    assert on_ranks(1, tmp_path, partial(run, stage, world, one)) == [0]
    assert on_ranks(2, tmp_path, partial(run, stage, world, two)) == [0, 0]
    assert_close(two, one)


def test_in_bf16_the_curve_is_the_same_and_weights_stay_in_float32(
    world: World, tmp_path: Path
) -> None:
    one, two = tmp_path / "one/model", tmp_path / "two/model"
    stage = partial(sft, config=SFT.model_copy(update={"precision": "bf16"}))
    assert on_ranks(1, tmp_path, partial(run, stage, world, one)) == [0]
    assert on_ranks(2, tmp_path, partial(run, stage, world, two)) == [0, 0]
    mine, theirs = (read_metrics(f.with_name("metrics")) for f in (two, one))
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=CURVE_BF16)
    assert {str(x.dtype) for x in weights_of(two).values()} == {"torch.float32"}


def test_a_model_whose_layers_compute_themselves(world: World, tmp_path: Path) -> None:
    sizes = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.0
    other = copy.copy(world)
    other.base = tmp_path / "gpt2"
    torch.manual_seed(0)
    save_policy(AutoModelForCausalLM.from_config(sizes), load_tokenizer(world.base), other.base)
    one, two = tmp_path / "one/model", tmp_path / "two/model"
    assert on_ranks(1, tmp_path, partial(run, sft, other, one)) == [0]
    assert on_ranks(2, tmp_path, partial(run, sft, other, two)) == [0, 0]
    assert_close(two, one)


SHORT = PPO.model_copy(update={"episodes": 8, "batch": 8, "minibatch": 4, "recompute": True})


@pytest.mark.parametrize(
    "stage",
    [
        partial(sft, config=SFT.model_copy(update={"epochs": 1, "recompute": True})),
        partial(reward, rows=5),
        partial(ppo, config=SHORT),
    ],
    ids=["sft", "reward", "ppo"],
)
def test_a_rank_that_has_nothing_to_do_in_a_pass_changes_nothing(
    stage: Stage, world: World, tmp_path: Path
) -> None:
    one, three = tmp_path / "one/model", tmp_path / "three/model"
    assert on_ranks(1, tmp_path, partial(run, stage, world, one)) == [0]
    job = partial(run, partial(one_tree_a_pass, stage), world, three)
    assert on_ranks(3, tmp_path, job) == [0, 0, 0]
    assert_close(three, one)


@pytest.mark.parametrize(
    ("stage", "steps"),
    [(sft, 2), (reward, 2), (ppo, 4), (ahead, 2), (adapted(ppo, PPO), 4)],
    ids=["sft", "reward", "ppo", "ahead", "ppo-lora"],
)
def test_a_checkpoint_of_two_ranks_is_taken_up_by_one_and_the_other_way(
    stage: Stage, steps: int, world: World, tmp_path: Path
) -> None:
    """`steps` of optimizers from a checkpoint to the next; there are three in a run."""
    one, mixed = tmp_path / "one/model", tmp_path / "mixed/model"
    assert on_ranks(1, tmp_path, partial(run, stage, world, one)) == [0]
    job = partial(run, stage, world, mixed)
    for size in (2, 1):
        assert on_ranks(size, tmp_path, job, (0, killed, steps + 1))[0] == -signal.SIGKILL
    # It did not begin anew, or it would be killed.
    assert on_ranks(2, tmp_path, job, (0, killed, steps + 1)) == [0, 0]
    assert_close(mixed, one)


def killed_while_writing() -> None:
    """From now on who writes more than this into a file is killed as it does so."""
    signal.signal(signal.SIGXFSZ, lambda *_: killed())
    full_disk()


@pytest.mark.parametrize(
    ("disturb", "codes"), [(full_disk, [1, 1]), (killed_while_writing, [1, -signal.SIGKILL])]
)
def test_one_rank_that_cannot_save_leaves_the_last_checkpoint_of_all(
    disturb: Callable[[], None], codes: list[int], world: World, tmp_path: Path
) -> None:
    stage = partial(sft, config=test_checkpoint.SFT)
    peace, disturbed = tmp_path / "peace/model", tmp_path / "disturbed/model"
    assert on_ranks(2, tmp_path, partial(run, stage, world, peace)) == [0, 0]
    job = partial(run, stage, world, disturbed)
    # The checkpoint of step 2 is whole, that of step 4 is not.
    assert on_ranks(2, tmp_path, job, (1, disturb, 3)) == codes
    whole = disturbed.parent / "checkpoint/model/2"
    assert sorted(f.name for f in whole.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert not (whole.parent / "4").exists()
    assert (whole.parent / ".4").exists() == (codes[1] != 1)
    assert on_ranks(2, tmp_path, job, (1, killed, 6)) == [0, 0]
    assert_same(disturbed, peace)
    assert [p.name for p in whole.parent.iterdir()] == ["6"]


def halves(base: Path) -> None:
    model: Any = load_policy(base)
    names, weights = model.state_dict().keys(), sum(p.numel() for p in model.parameters())
    ranks.shard(model)
    optimizer = adam(model.parameters(), 1.0)
    here: list[Any] = [*model.parameters()]
    here += [x for state in optimizer.state.values() for n, x in state.items() if n != "step"]
    assert sum(x.to_local().numel() for x in here) == pytest.approx(3 * weights / 2, rel=0.01)
    assert ranks.whole(model).keys() == names

    layers, whole = model.model.layers, []
    for layer in layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda *_: whole.append([not isinstance(x.mlp.up_proj.weight, DTensor) for x in layers])
        )
    packed_logprobs(model, *pack_pairs([([1, 2], [3])]))
    assert whole == [[True, False], [False, True]]


def test_a_rank_keeps_half_of_weights_and_moments_and_one_layer_is_whole_at_a_time(
    world: World, tmp_path: Path
) -> None:
    assert on_ranks(2, tmp_path, partial(halves, world.base)) == [0, 0]


def passes_and_parts() -> None:
    trees = [Tree([0] * (1 + n % 5)) for n in range(11)]
    for tokens in (1, 4, 100):
        mine = list(ranks.passes(trees, tokens))
        everyones = ranks.everyone(mine)
        assert len({len(own) for own in everyones}) == 1
        taken = [i for own in everyones for part, counts in own for i in part if counts]
        assert sorted(taken) == list(range(11))
    assert ranks.everyone(ranks.part("abcdefgh")) == ["ab", "cde", "fgh"]
    assert ranks.total(torch.tensor([1.0, ranks.rank()])).tolist() == [3.0, 3.0]
    found = [torch.full((2,), i) if i == ranks.rank() else torch.empty(0) for i in range(3)]
    assert torch.equal(torch.cat(ranks.complete(found)), torch.tensor([0, 0, 1, 1, 2, 2]))


def test_what_three_ranks_do_together_is_everything_once(tmp_path: Path) -> None:
    assert on_ranks(3, tmp_path, passes_and_parts) == [0, 0, 0]


class Drawn(ByPrompt):
    """Says what it was asked for."""

    asked: list[tuple[int, int]] = []  # noqa: RUF012  one a process

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        self.asked.append((seed, len(prompts)))
        return super().sample(prompts, max_tokens, seed, samples)


def asked_of_engines(world: World, folder: Path) -> None:
    sampler: Any = Drawn(world.sft)
    with closing(Metrics(folder.with_name("metrics"))) as metrics:
        texts = documents(60, seed=20)
        train_ppo(SHORT, world.sft, world.reward, prompts(40), texts, sampler, folder, metrics)
    everyones = [call for calls in ranks.everyone(sampler.asked) for call in calls]
    assert len({seed for seed, _ in everyones}) == 2
    assert [count for _, count in everyones] == [4, 4]


def test_every_rank_draws_its_own_part_with_a_seed_of_its_own(world: World, tmp_path: Path) -> None:
    job = partial(asked_of_engines, world, tmp_path / "policy")
    assert on_ranks(2, tmp_path, job) == [0, 0]
