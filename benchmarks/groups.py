"""Groups of raters with a head each, beside one head for all: two tastes that conflict in part,
four of five rankings by the larger group; and one taste that both groups share.

Sentences of the demo's world and simulated raters, three seeds, a core each; a base model from
scratch for each. QUICK=1 takes one seed and a few steps.
"""

import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.ablations import BASE, REWARD, SEEDS
from benchmarks.result import Figure, figure
from benchmarks.worlds import QUICK, K
from contracts.prompt import ChatMessage
from demo.people import ERROR_RATE
from demo.raters import ceiling, rank
from demo.tasks import (
    PENALTY,
    Task,
    base_text,
    demonstration,
    faulty_answers,
    gold_score,
    good_answer,
    make_task,
    violations,
)
from demo.words import CHATTER, NAMES
from training.data import PromptRow, RankedRow, SftRow, prompt_text
from training.metrics import Metrics
from training.model import hide_progress_bars, load_tokenizer
from training.pretrain import pretrain
from training.reward_head import RewardModel
from training.reward_model import encode_rankings, score_pairs, train_reward_model

DOCUMENTS, DEMONSTRATIONS = (500, 500) if QUICK else (2000, 4000)
LEARNED, TESTED = (200, 50) if QUICK else (1000, 300)
# Whose id begins with a group's name is in it. One ranking of so many is the smaller group's.
Groups = dict[str, tuple[str, ...]]
GROUPS: Groups = {"larger": ("larger-*",), "smaller": ("smaller-*",)}
SHARE, RATERS = 5, 10
# What an answer without a word before it is worth to who likes one.
CURT = 2 / 3
PRETRAIN = BASE.model_copy(update={"precision": "fp32", "steps": 20 if QUICK else 300})
REWARDS = REWARD.model_copy(update={"precision": "fp32", "prompts_per_batch": 8, "epochs": 2})
UNIT = "share of held-out pairs"

Taste = Callable[[str, str], float]


def plain(prompt: str, answer: str) -> float:
    """The demo's: a word that says nothing is a fault, as every other."""
    return gold_score(prompt, answer, finished=True)


def chatty(prompt: str, answer: str) -> float:
    """The same but for that: an answer should begin with such a word."""
    faults = violations(prompt, answer)
    rest = prod(1 - PENALTY[fault] for fault in faults if fault != "chatter")
    return rest if "chatter" in faults else rest * CURT


TASTES: dict[str, dict[str, Taste]] = {
    "conflict": {"larger": plain, "smaller": chatty},
    "agree": {"larger": plain, "smaller": plain},
}


@dataclass(frozen=True)
class World:
    """Rankings to learn from, and by name of a group those of its other raters; no prompt is in
    both. `ceiling` is how often each true taste is right about the latter.
    """

    learned: list[RankedRow]
    held_out: dict[str, list[RankedRow]]
    ceiling: dict[str, float]


def measure() -> list[Figure]:
    """All seeds."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        runs = list(pool.map(figures_of, SEEDS))
    return [figure(name, [run[name] for run in runs], UNIT) for name in runs[0]]


def figures_of(seed: int) -> dict[str, float]:
    """Every figure of one seed: world.accuracy@group,head."""
    torch.set_num_threads(1)
    hide_progress_bars()
    rng = random.Random(f"groups:{seed}")
    tasks = sentences(rng, LEARNED + TESTED)
    demonstrations = [demonstrated(make_task(rng), rng) for _ in range(DEMONSTRATIONS)]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sheets = [f"{prompt_text(row)}\n{row.response}" for row in demonstrations]
        with closing(Metrics(folder)) as metrics:
            texts = [*base_text(rng, DOCUMENTS), *sheets]
            config = PRETRAIN.model_copy(update={"seed": seed})
            pretrain(config, texts, folder / "base", metrics)
        for name, tastes in TASTES.items():
            world = ranked_by(tastes, tasks, random.Random(f"raters:{seed}"))
            run = compared(world, demonstrations[:500], folder, name, seed)
            found |= {f"{name}.accuracy@{of}": value for of, value in run.items()}
            print(f"{seed}: {name}: {run}", flush=True)
    return found


def sentences(rng: random.Random, count: int) -> list[Task]:
    """Tasks to write a sentence, no two of the same prompt: the shortest answers there are."""
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = make_task(rng)
        if task.use_case == "generation":
            tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def demonstrated(task: Task, rng: random.Random) -> SftRow:
    return SftRow(**vars(_row(task)), response=demonstration(task, rng))


def _row(task: Task) -> PromptRow:
    message = ChatMessage(role="user", content=task.prompt)
    return PromptRow(task.prompt, task.prompt, "", (message,), task.use_case)


def ranked_by(tastes: Mapping[str, Taste], tasks: Sequence[Task], rng: random.Random) -> World:
    """The first tasks ranked by one group each, the others by both, of other raters."""
    names, learned = list(tastes), list[RankedRow]()
    held_out: dict[str, list[RankedRow]] = {name: [] for name in names}
    judged: dict[str, list[tuple[list[float], list[list[int]]]]] = {name: [] for name in names}
    for i, task in enumerate(tasks):
        answers, teaches = answered(task, rng), i < LEARNED
        for name in [names[rng.randrange(SHARE) == 0]] if teaches else names:
            scores = [tastes[name](task.prompt, answer) for answer in answers]
            order = rank(scores, rng, ERROR_RATE)
            rater = f"{name}-{'' if teaches else 'other-'}{rng.randrange(RATERS)}"
            row = ranking(task, rater, answers, order)
            (learned if teaches else held_out[name]).append(row)
            if not teaches:
                judged[name].append((scores, order))
    return World(learned, held_out, {name: ceiling(of) for name, of in judged.items()})


def answered(task: Task, rng: random.Random) -> list[str]:
    """Up to K answers, right and with one fault each; half of them begin with a word that says
    nothing.
    """
    faulty = faulty_answers(task, rng)
    faulty.pop("chatters")
    answers = [good_answer(task, rng), *faulty.values()]
    chosen = rng.sample(answers, min(K, len(answers)))
    return [chattering(a, rng) if rng.random() < 0.5 else a for a in chosen]


def chattering(answer: str, rng: random.Random) -> str:
    first = answer if answer.split(maxsplit=1)[0] in NAMES else answer[0].lower() + answer[1:]
    return rng.choice(CHATTER) + first


def ranking(task: Task, rater: str, answers: list[str], order: list[list[int]]) -> RankedRow:
    place = {answer: n for n, tied in enumerate(order) for answer in tied}
    return RankedRow(
        **vars(_row(task)),
        rater_id=rater,
        responses=tuple(answers),
        finished=(True,) * len(answers),
        ranks=tuple(place[i] for i in range(len(answers))),
    )


def compared(
    world: World, demonstrations: Sequence[SftRow], folder: Path, name: str, seed: int
) -> dict[str, float]:
    """Accuracy on each group's held-out rankings, by group and head: one for all, one for all that
    saw the smaller group's rankings as often as the larger's, the group's own, the mean of both
    groups'; and of the group's true taste.
    """

    def trained(kind: str, rows: Sequence[RankedRow], groups: Groups) -> Path:
        config = REWARDS.model_copy(update={"seed": seed, "groups": groups})
        model = folder / f"{name}-{kind}" / "model"
        with closing(Metrics(model.parent)) as metrics:
            train_reward_model(config, folder / "base", rows, demonstrations, model, metrics)
        return model

    fewer = [row for row in world.learned if row.rater_id.startswith("smaller-")]
    one = trained("one", world.learned, {})
    repeated = trained("repeated", [*world.learned, *fewer * (SHARE - 2)], {})
    each = trained("each", world.learned, GROUPS)
    tokenizer, found = load_tokenizer(one), {}
    for group, rows in world.held_out.items():
        heads = {
            "one": RewardModel.load(one),
            "repeated": RewardModel.load(repeated),
            "own": RewardModel.load(each, group=group),
            "mean": RewardModel.load(each),
        }
        ranked = encode_rankings(REWARDS, tokenizer, rows)
        for kind, head in heads.items():
            found[f"{group},{kind}"] = score_pairs(head.eval(), ranked).accuracy
        found[f"{group},taste"] = world.ceiling[group]
    return found
