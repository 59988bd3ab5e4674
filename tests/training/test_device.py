"""Stages on another device than the processor, as far as this can be had without a GPU.

`pretend` refuses what a GPU refuses and computes what a CPU computes: what a stage leaves there has
the same bits. Each test has a child process for it.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM

from tests import pretend_device
from tests.training import test_checkpoint
from tests.training.architectures import ARCHITECTURES, UNPACKABLE
from tests.training.letters import (
    PRETRAIN,
    TorchSampler,
    World,
    demonstrations,
    documents,
    prompts,
    rankings,
)
from tests.training.test_checkpoint import (
    AHEAD,
    LORA,
    PPO,
    REWARD,
    Stage,
    assert_same,
    killed,
    ppo,
    reward_model,
    sft,
    start,
)
from tests.training.test_ranks import assert_close
from tests.training.test_reward_models import foreign
from training.config import DpoConfig, EvaluationConfig, SftConfig, StageConfig
from training.device import Device, across, fastest_precision, moved
from training.dpo import train_dpo
from training.evaluation.comparison import (
    compare,
    judge_by,
    kl_between,
    language_model_loss,
    mean_rewards,
    reward_judge,
)
from training.evaluation.reward_models import cross_validate, held_out_figures
from training.experience import evaluate_rollout
from training.likelihood import accumulate_likelihood
from training.metrics import Metrics
from training.model import load_policy, load_tokenizer, response_logprobs
from training.networks import load_networks
from training.optimizer import adam, step
from training.ppo import update, usable_prompts
from training.pretrain import pretrain
from training.reward_model import accumulate_gradients, encode_rankings
from training.rollout import engine_settings, pack

__all__ = ["foreign"]

# Dropout of a GPU is drawn in another way than that of a CPU.
SFT = test_checkpoint.SFT.model_copy(update={"dropout": 0.0})
THERE: Any = pretend_device.NAME


def of_base(world: World, folder: Path, metrics: Metrics, config: Any) -> None:
    pretrain(config, documents(40, seed=0), folder, metrics)


def dpo(world: World, folder: Path, metrics: Metrics, config: DpoConfig) -> None:
    train_dpo(config, world.sft, rankings(24, seed=3), folder, metrics)


BF16, ADAPTER = {"precision": "bf16"}, {"lora": LORA}
CASES: dict[str, tuple[Callable[..., None], StageConfig, dict[str, Any]]] = {
    "pretrain": (of_base, PRETRAIN, {"steps": 6, "checkpoint_every": 3}),
    "sft": (sft, SFT, {"choose_by_reward": True}),
    "sft-bf16": (sft, SFT, BF16 | {"recompute": True}),
    "sft-lora": (sft, SFT, ADAPTER),
    "reward": (reward_model, REWARD, {}),
    "reward-bf16": (reward_model, REWARD, BF16 | {"ranking": "plackett_luce"}),
    "reward-lora": (reward_model, REWARD, ADAPTER),
    "dpo": (dpo, DpoConfig(prompts_per_batch=8, learning_rate=1e-3), {}),
    "ppo": (ppo, PPO, {}),
    "ppo-bf16": (ppo, PPO, BF16 | {"recompute": True}),
    "ppo-lora": (ppo, PPO, ADAPTER),
    "rloo-ahead": (ppo, AHEAD, {}),
    "grpo": (ppo, AHEAD, {"advantage": "grpo", "overlap": False, "kl_controller": "fixed"}),
}


def configured(stage: Callable[..., None], config: StageConfig, device: str = "cpu") -> Stage:
    """The stage with its config, in a process of its own on the device."""
    return partial(on, device, partial(stage, config=config.model_copy(update={"device": device})))


def on(device: str, job: Callable[..., None], *args: Any) -> None:
    if device == THERE:
        with pretend_device.pretend_device():
            job(*args)
    else:
        job(*args)


@pytest.mark.parametrize("name", CASES)
def test_a_stage_leaves_there_what_it_leaves_on_a_cpu(
    name: str, world: World, tmp_path: Path
) -> None:
    stage, config, changes = CASES[name]
    config = config.model_copy(update=changes)
    here, there = tmp_path / "here/model", tmp_path / "there/model"
    assert start(configured(stage, config), world, here) == 0
    assert start(configured(stage, config, THERE), world, there) == 0
    # The base model goes through the library's attention, which has a kernel of its own on a CPU.
    (assert_close if name == "pretrain" else assert_same)(there, here)


@pytest.mark.parametrize(
    # Steps of optimizers: more than from one checkpoint to the next, less than to the one after.
    ("name", "after"),
    [("sft", 2), ("ppo", 6), ("rloo-ahead", 3), ("ppo-lora", 6)],
)
def test_a_stage_goes_on_from_its_checkpoint_on_another_device(
    name: str, after: int, world: World, tmp_path: Path
) -> None:
    stage, config, changes = CASES[name]
    config = config.model_copy(update={**changes, "checkpoint_every": 1})
    here, mixed = tmp_path / "here/model", tmp_path / "mixed/model"
    there = configured(stage, config, THERE)
    alone = configured(stage, config)
    assert start(alone, world, here) == 0
    for done, job in enumerate((alone, there), 1):
        assert start(job, world, mixed, killed, after) == -signal.SIGKILL
        assert [p.name for p in mixed.parent.glob("checkpoint/model/*")] == [str(done)]
    assert start(alone, world, mixed) == 0
    assert_same(mixed, here)


def test_the_devices_random_numbers_go_on(world: World, tmp_path: Path) -> None:
    """Those of dropout, which the processor's do not bring back."""
    job = configured(sft, test_checkpoint.SFT, THERE)
    peace, disturbed = tmp_path / "peace/model", tmp_path / "disturbed/model"
    assert start(job, world, peace) == 0
    assert start(job, world, disturbed, killed, 3) == -signal.SIGKILL
    assert start(job, world, disturbed, killed, 6) == 0
    assert_same(disturbed, peace)


def in_child(job: Callable[..., None], *args: Any) -> int | None:
    """Run on the device; the exit code."""
    child = test_checkpoint.CONTEXT.Process(target=on, args=(THERE, job, *args))
    child.start()
    child.join(240)
    return child.exitcode


def two_devices() -> None:
    left, right = torch.ones(2), torch.ones(2).to(THERE)
    assert (right + torch.tensor(1.0)).tolist() == [2.0, 2.0]
    for wrong in (torch.add, torch.mul):
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            wrong(left, right)
    pretend_device.waits.clear()
    across([left, (left,)], right.device)
    right[torch.ones(2, device=THERE, dtype=torch.long)].sum()
    assert not pretend_device.waits
    left.to(THERE)
    right[right > 0].sum().item()
    waited = {"copy": 1, "index by a mask": 1, "_local_scalar_dense": 1}
    assert pretend_device.waits == waited


def test_the_device_refuses_the_processors_tensors_and_counts_who_waits() -> None:
    assert in_child(two_devices) == 0


def figures_of(world: World, other: Path, device: Device) -> list[Any]:
    """All that is measured of models."""
    sampler: Any = TorchSampler(world.sft)
    rows, held_out = prompts(20), rankings(12, seed=99)
    config = EvaluationConfig(max_prompts=8).model_copy(update={"device": device})
    answers = compare(config, sampler, world.base, world.sft, rows, PPO)
    reward = REWARD.model_copy(update={"device": device, "folds": 2})
    pairs = list(zip(answers.prompts, [s[0].token_ids for s in answers.after.samples], strict=True))
    logprobs = response_logprobs(load_policy(world.sft, device), pairs)
    return [
        *(judge_by(reward_judge(f, -1.0, device), answers) for f in (world.reward, other)),
        kl_between(world.sft, world.base, answers, device),
        language_model_loss(world.sft, documents(10, seed=9), 20, device),
        mean_rewards(config, sampler, [world.base, world.sft], world.reward, rows, PPO),
        held_out_figures(reward, [world.reward, world.reward], held_out),
        cross_validate(reward, world.sft, rankings(24, seed=3), demonstrations(8, seed=4)),
        [x.tolist() for x in logprobs],
    ]


def write_figures(world: World, other: Path, file: Path) -> None:
    torch.set_num_threads(1)
    file.write_text(repr(figures_of(world, other, THERE)))


def test_what_is_measured_there_is_what_is_measured_on_a_cpu(
    world: World, foreign: Path, tmp_path: Path
) -> None:
    assert in_child(write_figures, world, foreign, tmp_path / "figures") == 0
    torch.set_num_threads(1)
    assert (tmp_path / "figures").read_text() == repr(figures_of(world, foreign, "cpu"))


# Of those that see row by row: models that need no more of a device than the pretended one has.
IN_ROWS = ("soft cap", "sliding window")


def likelihoods(device: Device) -> dict[str, list[float]]:
    """Loss and squared gradients of every family, in one row and row by row."""
    found = {}
    for name in (*ARCHITECTURES, *IN_ROWS):
        torch.manual_seed(0)
        config = (ARCHITECTURES | UNPACKABLE)[name]()
        model = moved(AutoModelForCausalLM.from_config(config).float().eval(), device)
        loss = accumulate_likelihood(model, [([5, 6, 7], [11, 12, 0]), ([8], [13, 0])], "fp32")
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        found[name] = [loss.item(), *(x.square().sum().item() for x in gradients)]
    return found


def write_likelihoods(file: Path) -> None:
    torch.set_num_threads(1)
    file.write_text(json.dumps(likelihoods(THERE)))


def test_other_architectures_learn_there_too(tmp_path: Path) -> None:
    assert in_child(write_likelihoods, tmp_path / "found") == 0
    torch.set_num_threads(1)
    found, expected = json.loads((tmp_path / "found").read_text()), likelihoods("cpu")
    assert found.keys() == {*ARCHITECTURES, *IN_ROWS}
    for name, figures in found.items():
        assert figures == pytest.approx(expected[name], rel=1e-4)


def who_waits(world: World) -> None:
    """An update reads its figures at once, and otherwise gives work without looking back."""
    waits = pretend_device.waits
    config = PPO.model_copy(update={"device": THERE})
    nets = load_networks(world.sft, world.reward, device=THERE)
    tokenizer = load_tokenizer(world.sft)
    ids = usable_prompts(config, tokenizer, prompts(16))
    samples = TorchSampler(world.sft).sample(ids, 8, seed=1)
    rollout = pack(ids, [s[0] for s in samples], device=THERE)
    experience = evaluate_rollout(config, nets, rollout, 0.1)
    optimizers = [adam(network.parameters(), 1e-3) for network in nets.trained.values()]
    text_PT = torch.ones(4, 16, dtype=torch.long)

    waits.clear()
    update(config, nets, experience, list(range(16)), text_PT)
    assert waits == {"copy": 1}
    waits.clear()
    for network, optimizer in zip(nets.trained.values(), optimizers, strict=True):
        step(network, optimizer, 1.0)
    accumulate_likelihood(nets.policy, [([5, 6], [7, 8])], "fp32")
    assert not waits
    assert nets.value is not None
    accumulate_gradients(nets.value, encode_rankings(REWARD, tokenizer, rankings(8, 3)), "fp32")
    assert waits == {"copy": 1}
    waits.clear()
    evaluate_rollout(config, nets, rollout, 0.1)
    assert sum(waits.values()) == 2, waits


def test_an_update_waits_for_the_device_once(world: World) -> None:
    assert in_child(who_waits, world) == 0


ONCE: tuple[tuple[str, Callable[..., None], StageConfig, dict[str, Any]], ...] = (
    ("gae", ppo, PPO, {"episodes": 8, "batch": 8, "minibatch": 8}),
    ("grpo", ppo, AHEAD, {"episodes": 8, "batch": 8, "minibatch": 8, "overlap": False}),
    ("reward", reward_model, REWARD, {"epochs": 1, "prompts_per_batch": 24}),
)


def one_step(world: World, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, stage, config, changes in ONCE:
        own = folder / name / "model"
        with closing(Metrics(own.with_name("metrics"))) as metrics:
            stage(world, own, metrics, config.model_copy(update={**changes, "checkpoint_every": 0}))


def test_steps_by_triton_are_those_of_its_eager_twins(world: World, tmp_path: Path) -> None:
    """On a GPU a stage calls the kernels; here Triton's interpreter runs them in its place."""
    (tmp_path / "world").write_bytes(pickle.dumps(world))
    program = [sys.executable, "-m", "tests.training.triton_program"]
    subprocess.run(
        [*program, str(tmp_path / "world"), str(tmp_path / "triton")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    one_step(world, tmp_path / "eager")
    for name, *_ in ONCE:
        assert_close(tmp_path / "triton" / name / "model", tmp_path / "eager" / name / "model")


def test_a_device_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device: TypeAdapter[Device] = TypeAdapter(Device)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [device.validate_python(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    for wrong in ("cuda", "gpu", 3):
        with pytest.raises(ValidationError):
            device.validate_python(wrong)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [device.validate_python(name) for name in ("auto", "cuda", "cpu")] == [
        "cuda",
        "cuda",
        "cpu",
    ]


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_of_a_gpu_is_what_it_multiplies(
    able: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: able)
    assert fastest_precision("cuda") == precision
    config = SftConfig.model_validate({"device": "auto", "precision": "auto"})
    assert (config.device, config.precision) == ("cuda", precision)


def test_where_a_stage_runs_is_no_part_of_what_it_is() -> None:
    assert "device" not in SftConfig().model_dump()
    assert "device" not in EvaluationConfig().model_dump()


def test_an_engine_on_a_gpu_shares_it_and_computes_in_the_trainers_type() -> None:
    assert engine_settings(True, "bf16", 0.3) == {"dtype": "float32"}
    assert engine_settings(False, "fp32", 0.3) == {
        "dtype": "float32",
        "gpu_memory_utilization": 0.3,
    }
    assert engine_settings(False, "bf16", 0.5) == {
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.5,
    }
