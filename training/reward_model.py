"""Rankings > reward model (InstructGPT, 3.5 and C.2): all pairs of a prompt in one loss, ties
dropped.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from contracts.errors import InvalidInput
from training import lora, ranks
from training.backbone import recompute_layers
from training.checkpoint import Checkpoint, Stateful
from training.config import DpoConfig, RankingModel, RewardModelConfig
from training.data import (
    RankedRow,
    SftRow,
    encode_response,
    fits,
    length_mask,
    pad,
    render,
    shuffled_batches,
)
from training.device import Precision, across, device_of
from training.kernels import ranking_loss, strict_pairs
from training.metrics import Metrics, sum_of
from training.model import load_tokenizer
from training.objectives import plackett_luce_loss
from training.optimizer import adam, autocast, cosine_share, set_rate, step
from training.packing import PASS_TOKENS, Packed, Tree
from training.reward_head import RewardModel

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[RankingModel, Loss] = {
    "bradley_terry": ranking_loss,
    "plackett_luce": plackett_luce_loss,
}
# Of more demonstrations than this a sample sets the zero: its mean is off by 1/64 of their spread.
ZERO_SAMPLE = 4096
# Fewer do not say what a group likes, or say no more than what one or two people like.
LEAST_RANKINGS, LEAST_RATERS = 30, 5
# Of scores of demonstrations that are all the same.
LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Ranked:
    """One ranked prompt as tokens; `ranks` aligned with `responses`, 0 best, ties equal."""

    user_id: str
    rater_id: str
    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int, ...]
    # The rater's, where groups have heads of their own.
    group: str | None = None

    @property
    def tree(self) -> Tree:
        return Tree(self.prompt, self.responses)


def train_reward_model(
    config: RewardModelConfig,
    parent: Path,
    rows: Sequence[RankedRow],
    demonstrations: Sequence[SftRow],
    folder: Path,
    metrics: Metrics,
) -> None:
    """Train on `rows`, starting from the policy in `parent`, and save into the new folder `folder`.

    The mean score of `demonstrations` becomes the model's shift, so that they score 0 on average.
    Goes on from its checkpoint where there is one.
    """
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(parent)
    model = RewardModel.from_policy(parent, config.device, tuple(config.groups))
    ranked = by_group(config, encode_rankings(config, tokenizer, rows))
    rng = random.Random(config.seed)
    sample = rng.sample(demonstrations, min(ZERO_SAMPLE, len(demonstrations)))
    zero = demonstration_sequences(config, tokenizer, sample)
    if not ranked:
        raise InvalidInput(
            "reward model rankings", "at least one with two ranks", f"{len(rows)} rows, none usable"
        )
    if not zero:
        raise InvalidInput(
            "demonstrations",
            "at least one within the length limits, to set the reward model's zero",
            f"{len(demonstrations)} rows, none usable",
        )
    if config.lora is not None:
        lora.adapt(model.backbone, config.lora, config.seed)
    recompute_layers(model.backbone, config.recompute)
    ranks.shard(model)
    optimizer = adam(model.parameters(), config.learning_rate)

    size = config.prompts_per_batch
    batches = [b for _ in range(config.epochs) for b in shuffled_batches(len(ranked), size, rng)]
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "metrics": metrics}
    progress = Checkpoint(folder, config, ranked, parts)
    done = progress.restore()
    model.eval()  # no dropout
    for i, batch in enumerate(batches[done:], done):
        set_rate(
            optimizer,
            config.learning_rate * cosine_share(i, len(batches), config.final_rate_share),
        )
        part = [ranked[r] for r in batch]
        figures = accumulate_gradients(model, part, config.precision, LOSSES[config.ranking])
        norm = step(model, optimizer, config.max_grad_norm)
        metrics.write(i, **sum_of(ranks.everyone(figures)), grad_norm=norm.item())
        progress.save(i + 1)

    scores = score_sequences(model, zero)
    model.shift += scores.mean(0)
    model.spread.copy_(scores.std(0, correction=0).clamp_min(LEAST_SPREAD))
    model.save(folder, tokenizer)


def by_group(config: RewardModelConfig, ranked: list[Ranked]) -> list[Ranked]:
    """Rankings with their raters' groups, where the config has any. Raises InvalidInput for a rater
    without one, and for a group of too few.
    """
    if not config.groups:
        return ranked
    found = [replace(r, group=config.group_of(r.rater_id)) for r in ranked]
    for r in found:
        if r.group is None:
            raise InvalidInput("reward_model.groups", "a group for every rater", r.rater_id)
    for name in config.groups:
        raters = [r.rater_id for r in found if r.group == name]
        people = len(set(raters))
        if len(raters) < LEAST_RANKINGS or people < LEAST_RATERS:
            expected = f"at least {LEAST_RANKINGS} rankings of {LEAST_RATERS} raters to learn from"
            got = f"{len(raters)} of {people}"
            raise InvalidInput(f"reward_model.groups.{name}", expected, got)
    return found


def accumulate_gradients(
    model: RewardModel, ranked: Sequence[Ranked], precision: Precision, of: Loss = ranking_loss
) -> dict[str, float]:
    """The gradient of the loss of one batch, a few rankings at a time; loss and pair accuracy, of
    which each rank has a share.
    """
    passed = []
    pairs = sum(a < b for r in ranked for a in r.ranks for b in r.ranks)
    for part, counts in ranks.passes([r.tree for r in ranked], PASS_TOKENS):
        with autocast(precision, device_of(model)):
            scores_BK, ranks_BK, mask_BK = _score(model, [ranked[i] for i in part])
            mean = of(scores_BK, ranks_BK, mask_BK)
            share = mean * (counts * len(part) / len(ranked))
        share.backward()
        better_BKK = strict_pairs(ranks_BK, mask_BK)
        agreed_BKK = better_BKK & (scores_BK[:, :, None] > scores_BK[:, None, :])
        passed.append(torch.stack([share.detach(), agreed_BKK.sum() * counts]))
    # Read once, when all is on its way.
    losses, right = zip(*torch.stack(passed).tolist(), strict=True)
    return {"loss": sum(losses), "accuracy": sum(right) / pairs}


def encode_rankings(
    config: RewardModelConfig | DpoConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[RankedRow],
) -> list[Ranked]:
    """Rankings as tokens, without those that hold no strict pair or something too long."""
    ranked = [
        Ranked(
            user_id=row.user_id,
            rater_id=row.rater_id,
            prompt=render(tokenizer, row),
            responses=[
                encode_response(tokenizer, text, done) or [tokenizer.eos_token_id]
                for text, done in zip(row.responses, row.finished, strict=True)
            ],
            ranks=row.ranks,
        )
        for row in rows
        if len(set(row.ranks)) > 1
    ]
    limits = config.max_prompt_tokens, config.max_response_tokens
    return [r for r in ranked if fits(r.prompt, r.responses, *limits)]


def demonstration_sequences(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow]
) -> list[list[int]]:
    pairs = [(render(tokenizer, row), encode_response(tokenizer, row.response)) for row in rows]
    limits = config.max_prompt_tokens, config.max_response_tokens
    return [prompt + response for prompt, response in pairs if fits(prompt, [response], *limits)]


def _score(model: RewardModel, ranked: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ranks and mask, all [B, K], of rankings with up to K responses each; a prompt is
    computed once for all its responses. A score is that of the head of the rater's group.
    """
    packed = Packed([r.tree for r in ranked])
    mask_BK = length_mask(torch.tensor([len(r.ranks) for r in ranked]))
    described = pad([r.ranks for r in ranked])[0], mask_BK, mask_BK.nonzero(as_tuple=True)
    ranks_BK, mask_BK, places = across(described, device_of(model))
    scores_C = model.scores(packed, packed.ends)
    if model.groups:
        heads = [model.groups.index(r.group) for r in ranked if r.group for _ in r.ranks]
        heads_C = across(torch.tensor(heads), scores_C.device)
        scores_C = scores_C.gather(1, heads_C[:, None])[:, 0]
    scores_BK = scores_C.new_zeros(mask_BK.shape).index_put(places, scores_C)
    return scores_BK, ranks_BK, mask_BK


@torch.no_grad()
def score_trees(model: RewardModel, trees: Sequence[Tree], tokens: int = PASS_TOKENS) -> Tensor:
    """Scores, float32 [C], of every response of every tree in the order given; of a tree without
    responses, of the whole sequence; [C, G] where the model has groups. A pass of the model holds
    up to `tokens` tokens.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(trees)
    for part, _ in ranks.passes(trees, tokens):
        packed = Packed([trees[i] for i in part])
        counts = [len(trees[i].responses) or 1 for i in part]
        for i, own in zip(part, model.scores(packed, packed.ends).split(counts), strict=True):
            scores[i] = own
    return torch.cat(ranks.complete(scores))


def score_sequences(model: RewardModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Scores, float32 [N], of whole sequences (prompt and response), in the order given."""
    return score_trees(model, [Tree(s) for s in sequences])


def mean_score(model: RewardModel, sequences: Sequence[Sequence[int]]) -> float:
    return float(score_sequences(model, sequences).mean())


@dataclass(frozen=True)
class PairScores:
    """Every strict pair of held-out rankings: the reward's gap (preferred minus other), and whose
    ranking it is.
    """

    gaps: tuple[float, ...]
    raters: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of pairs in the right order; a gap of exactly 0 counts half."""
        return sum((g > 0) + 0.5 * (g == 0) for g in self.gaps) / len(self.gaps)


def score_pairs(model: RewardModel, ranked: Sequence[Ranked]) -> PairScores:
    """The model's view of each strict pair in `ranked`."""
    scores = iter(score_trees(model, [r.tree for r in ranked]).tolist())
    gaps, raters = [], []
    for r in ranked:
        rewards = [next(scores) for _ in r.ranks]
        for better, better_rank in zip(rewards, r.ranks, strict=True):
            for worse, worse_rank in zip(rewards, r.ranks, strict=True):
                if better_rank < worse_rank:
                    gaps.append(better - worse)
                    raters.append(r.rater_id)
    return PairScores(tuple(gaps), tuple(raters))


def calibration(gaps: Sequence[float], bins: int = 8) -> list[dict[str, float]]:
    """Predicted against observed preference by score gap (recipe, detail 8).

    Pairs are put in bins of equal size by |gap|; the model predicts sigmoid(|gap|) for the higher
    score.
    """
    ordered = sorted(gaps, key=abs)
    table = []
    for i in range(bins):
        part = ordered[i * len(ordered) // bins : (i + 1) * len(ordered) // bins]
        if part:
            predicted = sum(1 / (1 + math.exp(-abs(g))) for g in part) / len(part)
            observed = sum((g > 0) + 0.5 * (g == 0) for g in part) / len(part)
            gap = sum(abs(g) for g in part) / len(part)
            table.append(
                {"gap": gap, "predicted": predicted, "observed": observed, "pairs": len(part)}
            )
    return table
