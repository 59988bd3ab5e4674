"""What a reward model is worth on rankings that it was not trained on: accuracy, calibration, how
far others of other seeds disagree, and how it does on labelers that it never saw.

Shapes: N reward models, C responses.
"""

import random
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from contracts.errors import InvalidInput
from training.config import RewardModelConfig
from training.data import RankedRow, SftRow
from training.evaluation.comparison import Verdict
from training.evaluation.interval import clustered_mean
from training.metrics import Metrics
from training.model import load_tokenizer
from training.reward_head import RewardModel
from training.reward_model import (
    Ranked,
    calibration,
    encode_rankings,
    score_pairs,
    score_trees,
    train_reward_model,
)


def held_out_figures(
    config: RewardModelConfig, folders: Sequence[Path], rows: Sequence[RankedRow]
) -> dict[str, Any]:
    """Of the reward model in the first of `folders` on `rows`; with several, their disagreement.

    Nothing where `rows` hold no strict pair.
    """
    ranked = encode_rankings(config, load_tokenizer(folders[0]), rows)
    if not ranked:
        return {}
    pairs = score_pairs(RewardModel.load(folders[0], config.device).eval(), ranked)
    accuracy = clustered_mean([(g > 0) + 0.5 * (g == 0) for g in pairs.gaps], pairs.raters)
    figures: dict[str, Any] = {
        "accuracy": accuracy.mean,
        "ci95": accuracy.ci95,
        "pairs": len(pairs.gaps),
        "raters": len(set(pairs.raters)),
        "calibration": calibration(pairs.gaps),
    }
    if config.groups:
        figures["groups"] = _by_group(config, folders[0], ranked)
    if len(folders) > 1:
        trees = [r.tree for r in ranked]
        models = (RewardModel.load(folder, config.device).eval() for folder in folders)
        scores = [score_trees(model, trees).tolist() for model in models]
        figures["disagreement"] = disagreement(scores)
    return figures


def _by_group(
    config: RewardModelConfig, folder: Path, ranked: Sequence[Ranked]
) -> dict[str, dict[str, float]]:
    """How often the reward is right about each group's pairs, and how often the group's own head.
    A group without a strict pair is left out.
    """
    reward, found = RewardModel.load(folder, config.device).eval(), {}
    for name in config.groups:
        if theirs := [r for r in ranked if config.group_of(r.rater_id) == name]:
            own = RewardModel.load(folder, config.device, name).eval()
            pairs = score_pairs(reward, theirs)
            found[name] = {
                "accuracy": pairs.accuracy,
                "own_accuracy": score_pairs(own, theirs).accuracy,
                "pairs": len(pairs.gaps),
            }
    return found


def disagreement(scores_NC: Sequence[Sequence[float]]) -> float:
    """Mean over responses of the standard deviation (unbiased) of the rewards that N >= 2 reward
    models give them; all have demonstrations at 0.
    """
    return float(torch.tensor(scores_NC).std(dim=0).mean())


def answers_disagreement(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of the answers of the parent and of the new policy; `verdicts` of one reward model each."""
    return {
        f"disagreement_{side}": disagreement([[s for g in groups for s in g] for groups in scores])
        for side, scores in (
            ("before", [v.before for v in verdicts]),
            ("after", [v.after for v in verdicts]),
        )
    }


def labeler_groups(raters: Iterable[str], groups: int, seed: int) -> list[set[str]]:
    """All raters in groups of nearly equal size, at random. Raises InvalidInput where a group would
    be empty.
    """
    ordered = sorted(set(raters))
    if len(ordered) < groups:
        raise InvalidInput("reward_model.folds", f"at most {len(ordered)}, one a labeler", groups)
    random.Random(seed).shuffle(ordered)
    return [set(ordered[i::groups]) for i in range(groups)]


def cross_validate(
    config: RewardModelConfig,
    parent: Path,
    rows: Sequence[RankedRow],
    demonstrations: Sequence[SftRow],
) -> list[dict[str, Any]]:
    """Accuracy on each of `config.folds` groups of labelers, of a reward model trained on the
    others' rankings (InstructGPT, C.2).

    The models are not kept. `accuracy` is None for a group without a strict pair.
    """
    folds = []
    for group in labeler_groups((r.rater_id for r in rows), config.folds, config.seed):
        inside = [r for r in rows if r.rater_id not in group]
        outside = [r for r in rows if r.rater_id in group]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            with closing(Metrics(Path(scratch))) as metrics:
                train_reward_model(config, parent, inside, demonstrations, folder, metrics)
            found = held_out_figures(config, [folder], outside)
        fold = {"labelers": len(group), "accuracy": None, "pairs": 0}
        folds.append(fold | {k: v for k, v in found.items() if k in fold})
    return folds
