"""One epoch of the reward model on rankings of K answers, over TRL's on all their pairs."""

from functools import partial

import torch
from transformers import LlamaForSequenceClassification

from benchmarks import workloads
from benchmarks.baseline import Baseline, Run, agree, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.trl.worker import Clock
from training.device import Precision
from training.optimizer import adam
from training.reward_head import RewardModel
from training.reward_model import Ranked, accumulate_gradients

TRL = "1.16.0"
SHAPE = "tiny"
PROMPTS = {4: 16, 9: 8}
STEP = 8
RUNS = 3
MICRO_BATCHES = (8, 16, 24, 48)
GOALS = {4: ">= 7", 9: ">= 22"}


def measure() -> list[Figure]:
    """Process CPU on one thread, both sides in turn, TRL at the micro batch that suits it best."""
    torch.set_num_threads(1)
    baseline = Baseline("reward_model", TRL)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    try:
        micro = {p: _best_micro_batch(baseline, p == "bf16") for p in precisions}
        return [f for k in PROMPTS for f in _measure(baseline, k, micro)]
    finally:
        baseline.close()


def _measure(baseline: Baseline, k: int, micro: dict[Precision, int]) -> list[Figure]:
    settings = {"shape": SHAPE, "k": k, "prompts": PROMPTS[k], "step": STEP}
    sides = {}
    for precision, pairs in micro.items():
        bf16 = precision == "bf16"
        sides[f"trl-{precision}"] = partial(baseline.run, **settings, bf16=bf16, micro=pairs)
        sides[precision] = partial(ours, k, precision)
    runs = in_turn(sides, RUNS)
    agree("loss of the first step", runs["fp32"][0]["loss"], runs["trl-fp32"][0]["loss"], 1e-3)
    figures = []
    for precision in micro:
        theirs, mine = runs[f"trl-{precision}"], runs[precision]
        name, goal = f"k{k}_{precision}", GOALS[k]
        figures += [
            figure(f"{name}_over_trl", ratios(theirs, mine), "x, CPU seconds", goal),
            figure(f"{name}_over_trl_wall", ratios(theirs, mine, "wall"), "x, wall seconds"),
            figure(f"{name}_prompts", [PROMPTS[k] / r["cpu"] for r in mine], "prompts/CPU s"),
        ]
    return figures


def _best_micro_batch(baseline: Baseline, bf16: bool) -> int:
    """Of TRL, in pairs, on rankings of four."""
    seconds = {
        micro: baseline.run(shape=SHAPE, k=4, prompts=STEP, step=STEP, bf16=bf16, micro=micro)[
            "cpu"
        ]
        for micro in MICRO_BATCHES
    }
    return min(seconds, key=lambda micro: seconds[micro])


def ours(k: int, precision: Precision) -> Run:
    """The same epoch as a stage of training does it."""
    ranked = [
        Ranked("user", "rater", prompt, answers, tuple(range(k)))
        for prompt, answers in workloads.rankings(k, PROMPTS[k])
    ]
    model = reward_model(SHAPE, seed=0)
    optimizer = adam(model.parameters(), 1e-5)
    losses = []
    clock = Clock()
    clock.start()
    for i in range(0, len(ranked), STEP):
        losses.append(accumulate_gradients(model, ranked[i : i + STEP], precision)["loss"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.stop()
    return {"wall": clock.wall, "cpu": clock.cpu, "loss": losses[0]}


def reward_model(shape: str, seed: int) -> RewardModel:
    """The weights of `workloads.scorer`."""
    return of_scorer(workloads.scorer(shape, seed))


def of_scorer(scorer: LlamaForSequenceClassification) -> RewardModel:
    """The same scores from our model, which takes over the scorer's backbone."""
    model = RewardModel(scorer.model).eval()
    with torch.no_grad():
        model.head.weight.copy_(scorer.score.weight)
    return model
