"""How often a reward model is right about workers whom it never saw, over TRL's: human rankings of
five outputs (RankME), read whole by ours and as pairs by TRL's.

A base model from scratch for each seed; both sides start from it and learn from the same rankings,
equally often, at that learning rate of RATES which did best on yet other workers in the first seed.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from transformers import LlamaForSequenceClassification

from benchmarks.baseline import Baseline
from benchmarks.result import Figure, estimate, figure
from benchmarks.reward_model import of_scorer
from benchmarks.worlds import imported
from contracts.dataset import SPLITS
from training.config import PretrainConfig, RewardModelConfig
from training.data import RankedRow, SftRow, prompt_text
from training.evaluation.interval import clustered_mean
from training.evaluation.reward_models import labeler_groups
from training.metrics import Metrics
from training.model import hide_progress_bars, load_tokenizer
from training.pretrain import pretrain
from training.reward_head import RewardModel
from training.reward_model import (
    PairScores,
    Ranked,
    encode_rankings,
    score_pairs,
    train_reward_model,
)

TRL = "1.16.0"
SEEDS = (1, 2, 3)
RATES = (3e-4, 1e-3, 3e-3)
# Of workers. Each of the first is tested in one seed; the last, in no seed, chooses learning rates.
GROUPS = 5
# Pairs in one pass of TRL's.
MICRO = 32
BASE = PretrainConfig(
    hidden_size=96, intermediate_size=256, layers=3, heads=3, steps=300, rows_per_step=8
)
CONFIG = RewardModelConfig(
    epochs=1, prompts_per_batch=16, max_prompt_tokens=120, max_response_tokens=120
)


@dataclass(frozen=True, eq=False)
class Start:
    """What both sides have in one seed: a base model, and rankings to learn from. `validation` and
    `test` are other workers'.
    """

    seed: int
    base: Path
    demonstrations: Sequence[SftRow]
    rankings: Sequence[RankedRow]
    validation: Sequence[Ranked]
    test: Sequence[Ranked]


# From a start and a learning rate.
Side = Callable[[Start, float], RewardModel]


def measure() -> list[Figure]:
    """All seeds on one thread; the data is in the folder that INSTRUCTLOOP_DATA names."""
    torch.set_num_threads(1)
    hide_progress_bars()
    sets, documents = imported()
    demonstrations = sets["sft", "train"]
    rankings = [row for split in SPLITS for row in sets["rm", split]]
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(Baseline("reward_accuracy", TRL)) as baseline,
    ):
        sides: dict[str, Side] = {"ours": cache(ours), "trl": cache(partial(theirs, baseline))}
        starts = [
            start(seed, Path(scratch) / str(seed), rankings, demonstrations, documents)
            for seed in SEEDS
        ]
        rates = best_rates(sides, starts[0])
        runs = [
            {
                name: score_pairs(train(begun, rates[name]), begun.test)
                for name, train in sides.items()
            }
            for begun in starts
        ]
    return [
        *figures([run["ours"] for run in runs], [run["trl"] for run in runs]),
        *(figure(f"learning_rate_{name}", [rate], "") for name, rate in rates.items()),
        figure("tied_pairs", [tied(rankings)], "share of all pairs"),
    ]


def start(
    seed: int,
    folder: Path,
    rankings: Sequence[RankedRow],
    demonstrations: Sequence[SftRow],
    documents: Sequence[str],
) -> Start:
    """Trains the base model into `folder`."""
    base = folder / "base"
    sheets = [f"{prompt_text(row)}\n{row.response}" for row in demonstrations]
    with closing(Metrics(folder)) as metrics:
        pretrain(BASE.model_copy(update={"seed": seed}), [*documents, *sheets], base, metrics)
    learned, chosen, tested = by_worker(rankings, seed)
    validation, test = (
        encode_rankings(CONFIG, load_tokenizer(base), rows) for rows in (chosen, tested)
    )
    return Start(seed, base, demonstrations, learned, validation, test)


def by_worker(
    rankings: Sequence[RankedRow], seed: int
) -> tuple[list[RankedRow], list[RankedRow], list[RankedRow]]:
    """Those of workers to learn from, of those who choose the learning rate, and of the tested."""
    groups = labeler_groups((row.rater_id for row in rankings), GROUPS, seed=0)
    test, validation = groups[SEEDS.index(seed)], groups[-1]
    return (
        [row for row in rankings if row.rater_id not in test | validation],
        [row for row in rankings if row.rater_id in validation],
        [row for row in rankings if row.rater_id in test],
    )


def best_rates(sides: Mapping[str, Side], begun: Start) -> dict[str, float]:
    """With which each side is right about most pairs of `validation`."""
    right: dict[str, dict[float, float]] = {name: {} for name in sides}
    for rate in RATES:
        for name, train in sides.items():
            right[name][rate] = score_pairs(train(begun, rate), begun.validation).accuracy
    print(f"accuracy on validation by learning rate: {right}", flush=True)
    return {name: max(found, key=lambda rate: found[rate]) for name, found in right.items()}


def ours(begun: Start, rate: float) -> RewardModel:
    """As a round trains it: the pairs of a ranking in one loss, in which every ranking weighs the
    same.
    """
    folder = begun.base.with_name(f"ours-{rate:g}")
    config = CONFIG.model_copy(update={"seed": begun.seed, "learning_rate": rate})
    with closing(Metrics(folder)) as metrics:
        parts = begun.base, begun.rankings, begun.demonstrations
        train_reward_model(config, *parts, folder / "model", metrics)
    return RewardModel.load(folder / "model").eval()


def theirs(baseline: Baseline, begun: Start, rate: float) -> RewardModel:
    """TRL's trainer on the same tokens in about as many steps: a row is a pair, and every pair
    weighs the same.
    """
    ranked = encode_rankings(CONFIG, load_tokenizer(begun.base), begun.rankings)
    pairs = pairs_of(ranked)
    folder = begun.base.with_name(f"trl-{rate:g}")
    folder.mkdir()
    file = folder / "pairs.json"
    file.write_text(json.dumps(pairs), encoding="utf-8")
    baseline.run(
        base=str(begun.base),
        pairs=str(file),
        folder=str(folder / "model"),
        epochs=CONFIG.epochs,
        learning_rate=rate,
        micro=MICRO,
        accumulate=round(CONFIG.prompts_per_batch * len(pairs) / len(ranked) / MICRO),
        seed=begun.seed,
    )
    saved = LlamaForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    return of_scorer(saved)


def pairs_of(ranked: Sequence[Ranked]) -> list[dict[str, list[int]]]:
    """TRL's rows. A tie is none of them: it has neither a chosen nor a rejected answer."""
    return [
        {"chosen_ids": r.prompt + better, "rejected_ids": r.prompt + worse}
        for r in ranked
        for better, higher in zip(r.responses, r.ranks, strict=True)
        for worse, lower in zip(r.responses, r.ranks, strict=True)
        if higher < lower
    ]


def tied(rows: Sequence[RankedRow]) -> float:
    """The share of pairs that neither side learns from or is tested on."""
    pairs = [pair for row in rows for pair in combinations(row.ranks, 2)]
    return mean(a == b for a, b in pairs)


def figures(ours: Sequence[PairScores], trl: Sequence[PairScores]) -> list[Figure]:
    """Of the same pairs, by seed. The interval is of the difference over all of them, with whole
    workers drawn, each of whom is tested in one seed.
    """
    runs = list(zip(ours, trl, strict=True))
    points = [100 * (mine.accuracy - other.accuracy) for mine, other in runs]
    gained = [
        100 * (_right(gap) - _right(other_gap))
        for mine, other in runs
        for gap, other_gap in zip(mine.gaps, other.gaps, strict=True)
    ]
    over = clustered_mean(gained, [worker for pairs in ours for worker in pairs.raters])
    share = "share of tested pairs"
    return [
        figure("accuracy_ours", [pairs.accuracy for pairs in ours], share),
        figure("accuracy_trl", [pairs.accuracy for pairs in trl], share),
        replace(figure("accuracy_over_trl", points, "points", ">= 0"), value=mean(points)),
        estimate("accuracy_over_trl_ci95", over.mean, over.ci95, "points"),
        figure("tested_pairs", [len(pairs.gaps) for pairs in ours], "pairs"),
        figure("tested_workers", [len(set(pairs.raters)) for pairs in ours], "workers"),
    ]


def _right(gap: float) -> float:
    return 0.5 if gap == 0 else float(gap > 0)
