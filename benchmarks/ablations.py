"""What InstructGPT's ablations vary, at small scale on generated and on real data: the weights of
the pretraining mix and of the KL penalty, how long is trained; and what could take the place of PPO
and of pairs.

Three seeds. Each run is kept below runs/ablations, so that an interrupted suite goes on. QUICK=1
takes one seed and a few steps.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch

from benchmarks.judged import Judged
from benchmarks.result import Figure, figure
from benchmarks.worlds import QUICK, WORLDS, K, World
from instructloop.stages import Stages
from instructloop.version import code_version
from training.config import (
    DpoConfig,
    EvaluationConfig,
    PpoConfig,
    PretrainConfig,
    RankingModel,
    RewardModelConfig,
    SftConfig,
    StageConfig,
)
from training.data import RankedRow, prompt_text
from training.dpo import train_dpo
from training.evaluation.comparison import (
    compare,
    judge_by,
    kl_between,
    language_model_loss,
    reward_judge,
)
from training.evaluation.reward_models import held_out_figures
from training.metrics import Metrics
from training.model import hide_progress_bars, load_policy
from training.ppo import train_ppo
from training.presets import TINY
from training.pretrain import pretrain
from training.reward_model import train_reward_model
from training.sft import train_sft

Config = TypeVar("Config", bound=StageConfig)

FOLDER = Path("runs/ablations")
SEEDS = (1,) if QUICK else (1, 2, 3)

BASE = PretrainConfig(
    hidden_size=96,
    intermediate_size=256,
    layers=3,
    heads=3,
    steps=20 if QUICK else 200,
    rows_per_step=8,
    precision="bf16",
)
SFT = SftConfig(**TINY["sft"])
REWARD = RewardModelConfig(**TINY["reward_model"] | {"epochs": 1, "learning_rate": 1e-3})
DPO = DpoConfig(
    prompts_per_batch=16,
    learning_rate=3e-4,
    precision="bf16",
    max_prompt_tokens=120,
    max_response_tokens=120,
)
BATCH, ITERATIONS, LONG, WINDOW = (64, 2, 4, 2) if QUICK else (64, 12, 48, 6)
PPO = PpoConfig(
    **TINY["ppo"]
    | {
        "episodes": BATCH * ITERATIONS,
        "batch": BATCH,
        "policy_rate": 5e-4,
        "max_response_tokens": 80,
        "checkpoint_every": 0,
    }
)
# What is varied: the mix at PPO's own penalty, the penalty without the mix.
PTX = (0.0, 0.1, PPO.ptx_coefficient, 2.5)
BETA = (0.0, PPO.beta, 0.5, 2.0)
RANKINGS: tuple[RankingModel, ...] = ("bradley_terry", "plackett_luce")
EVALUATION = EvaluationConfig(samples_per_prompt=2, max_prompts=100)
UNITS = {
    "accuracy": "share of held-out raters' pairs",
    "gold": "gold points",
    "gold_gain": "gold points over SFT",
    "gold_win_rate": "share",
    "kl": "nats per response",
    "lm_loss_rise": "nats per token over SFT",
    "reward": "reward points",
    "reward_gain": "reward points over SFT",
}


def measure() -> list[Figure]:
    """In the generated world; benchmarks/ablations_e2e.py is the other one."""
    return measured("generated")


def measured(name: str) -> list[Figure]:
    """All runs of all seeds in one world, a core each."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        runs = list(pool.map(partial(figures_of, name), SEEDS))
    return [
        figure(f"{name}.{key}", [run[key] for run in runs], UNITS[key.partition("@")[0]])
        for key in runs[0]
    ]


def figures_of(name: str, seed: int) -> dict[str, float]:
    """Every figure of one seed in one world, by measure@setting=value."""
    torch.set_num_threads(1)
    hide_progress_bars()
    identity = {"code": code_version(), "quick": QUICK}
    folder = FOLDER / f"{name}-{seed}"
    stages = Stages(folder, identity, lambda line: print(f"{folder.name}: {line}", flush=True))
    runs = Runs(WORLDS[name](seed), stages, seed)
    with closing(runs.sampler()) as sampler:
        rankings, held_out = runs.rankings(sampler)
        return {
            **runs.reward_models(rankings, held_out),
            **runs.mix(sampler),
            **runs.penalty(sampler),
            **runs.length(sampler),
            **runs.policies(sampler, rankings),
        }


class Runs:
    """One seed in one world: each run is a stage, done once."""

    def __init__(self, world: World, stages: Stages, seed: int) -> None:
        self._world, self._stages, self._seed = world, stages, seed
        self._base, self._sft, self._reward = (
            stages.path(name) / "model" for name in ("base", "sft", RANKINGS[0])
        )

    def sampler(self) -> Judged:
        """Trains the base model and the SFT policy, which a sampler starts from."""
        self._stages.run("base", self._pretrain)
        self._stages.run("sft", self._fine_tune)
        rows = [*self._world.prompts, *self._world.test, *self._world.asked]
        tokens = PPO.max_prompt_tokens + PPO.max_response_tokens
        return Judged(self._sft, tokens, rows, self._world.gold)

    def rankings(self, sampler: Judged) -> tuple[list[RankedRow], list[RankedRow]]:
        """Those to learn from, and those of raters who are held out; the same ones each time."""
        sampler.load(load_policy(self._sft).state_dict())
        asked, tokens = self._world.asked, PPO.max_response_tokens
        return self._world.rankings(sampler.answers(asked, tokens, self._seed, K) if asked else [])

    def reward_models(
        self,
        rankings: Sequence[RankedRow],
        held_out: Sequence[RankedRow],
        ways: Sequence[RankingModel] = RANKINGS,
    ) -> dict[str, float]:
        """One for each way to read a ranking: how often it is right about held-out raters."""
        found = {}
        for ranking in ways:
            learn = partial(self._learn_reward, ranking, rankings, held_out)
            found[f"accuracy@ranking={ranking}"] = self._stages.run(ranking, learn)["accuracy"]
        return found

    def mix(self, sampler: Judged) -> dict[str, float]:
        """The pretraining mix at PPO's own penalty."""
        runs = {f"ptx={ptx:g}": self.ppo(sampler, ptx_coefficient=ptx) for ptx in PTX}
        return _named(runs)

    def penalty(self, sampler: Judged) -> dict[str, float]:
        """The KL penalty without a mix."""
        runs = {
            f"beta={beta:g}": self.ppo(sampler, beta=beta, ptx_coefficient=0.0) for beta in BETA
        }
        return _named(runs)

    def length(self, sampler: Judged) -> dict[str, float]:
        """What a long run without penalty and mix sampled, in windows of its iterations."""
        steps = self.ppo(sampler, LONG, beta=0.0, ptx_coefficient=0.0)["steps"]
        return {
            f"{key}@episodes={BATCH * WINDOW * (i + 1)}": value
            for i, window in enumerate(windows(steps))
            for key, value in window.items()
        }

    def policies(self, sampler: Judged, rankings: Sequence[RankedRow]) -> dict[str, float]:
        """The base model, and what else could be made of the same rankings."""
        base = self._lm_loss(self._base) - self._lm_loss(self._sft)
        runs = {
            "policy=ppo": self.ppo(sampler, ptx_coefficient=0.0),
            "policy=ppo-ptx": self.ppo(sampler, ptx_coefficient=PPO.ptx_coefficient),
            "policy=dpo": self._stages.run("dpo", partial(self._dpo, sampler, rankings)),
        }
        return {"lm_loss_rise@policy=base": base, **_named(runs)}

    def _pretrain(self, folder: Path) -> dict[str, Any]:
        sheets = [f"{prompt_text(row)}\n{row.response}" for row in self._world.demonstrations]
        with closing(Metrics(folder)) as metrics:
            texts = [*self._world.documents, *sheets]
            pretrain(self._seeded(BASE), texts, folder / "model", metrics)
        return {"loss": metrics.rows[-1]["loss"]}

    def _fine_tune(self, folder: Path) -> dict[str, Any]:
        world = self._world
        with closing(Metrics(folder)) as metrics:
            config = self._seeded(SFT).model_copy(update={"epochs": world.epochs})
            rows, texts = world.demonstrations, world.documents
            train_sft(config, self._base, rows, [], folder / "model", metrics, texts)
        return {"loss": metrics.rows[-2]["loss"]}

    def _learn_reward(
        self,
        ranking: RankingModel,
        rankings: Sequence[RankedRow],
        held_out: Sequence[RankedRow],
        folder: Path,
    ) -> dict[str, Any]:
        config = self._seeded(REWARD).model_copy(update={"ranking": ranking})
        with closing(Metrics(folder)) as metrics:
            zero = self._world.demonstrations
            train_reward_model(config, self._sft, rankings, zero, folder / "model", metrics)
        return held_out_figures(config, [folder / "model"], held_out)

    def ppo(self, sampler: Judged, iterations: int = ITERATIONS, **settings: Any) -> dict[str, Any]:
        """A run with other settings than PPO's own, compared with SFT; what each iteration sampled,
        and the seconds of CPU time of it all and of sampling.
        """
        changes = {"episodes": BATCH * (iterations // self._world.shorter), **settings}
        config = self._seeded(PPO).model_copy(update=changes)

        def work(folder: Path) -> dict[str, Any]:
            world, before = self._world, len(sampler.means)
            started, sampled = time.process_time(), sampler.seconds
            with closing(Metrics(folder)) as metrics:
                train_ppo(
                    config,
                    self._sft,
                    self._reward,
                    world.prompts,
                    world.documents,
                    sampler,
                    folder / "model",
                    metrics,
                )
            steps = [
                {"kl": row["kl"], "reward": row["reward"], "gold": gold}
                for row, gold in zip(metrics.rows, sampler.means[before:], strict=True)
            ]
            cpu = {
                "cpu": time.process_time() - started,
                "sampling": sampler.seconds - sampled,
            }
            return {"steps": steps, **cpu, **self._compared(sampler, folder / "model")}

        named = "".join(f"-{name}-{value}" for name, value in settings.items())
        return self._stages.run(f"ppo-{iterations}{named}", work)

    def _dpo(self, sampler: Judged, rankings: Sequence[RankedRow], folder: Path) -> dict[str, Any]:
        with closing(Metrics(folder)) as metrics:
            train_dpo(self._seeded(DPO), self._sft, rankings, folder / "model", metrics)
        return self._compared(sampler, folder / "model")

    def _compared(self, sampler: Judged, policy: Path) -> dict[str, Any]:
        """With the SFT policy, on prompts that PPO was not trained on."""
        answers = compare(EVALUATION, sampler, self._sft, policy, self._world.test, PPO)
        gold = judge_by(self._world.gold, answers)
        reward = judge_by(reward_judge(self._reward, PPO.unfinished_reward), answers)
        return {
            "kl": kl_between(policy, self._sft, answers),
            "reward_gain": _mean(reward.after) - _mean(reward.before),
            "gold_gain": _mean(gold.after) - _mean(gold.before),
            "gold_win_rate": gold.win_rate.mean,
            "lm_loss_rise": self._lm_loss(policy) - self._lm_loss(self._sft),
        }

    def _lm_loss(self, policy: Path) -> float:
        return language_model_loss(policy, self._world.held_out, PPO.max_prompt_tokens)

    def _seeded(self, config: Config) -> Config:
        return config.model_copy(update={"seed": self._seed, "precision": self._world.precision})


def windows(steps: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means over WINDOW iterations each."""
    parts = [steps[i : i + WINDOW] for i in range(0, len(steps), WINDOW)]
    return [{key: mean(step[key] for step in part) for key in part[0]} for part in parts]


def _named(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {
        f"{measure}@{setting}": run[measure]
        for setting, run in runs.items()
        for measure in UNITS
        if measure in run
    }


def _mean(scores: Sequence[Sequence[float]]) -> float:
    return mean(score for group in scores for score in group)
