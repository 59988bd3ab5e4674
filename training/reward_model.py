"""Rankings > reward model (InstructGPT, 3.5 and C.2): all pairs of a prompt in one loss, ties
dropped.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from contracts.errors import InvalidInput
from training.config import RewardModelConfig
from training.data import (
    RankedRow,
    SftRow,
    encode_response,
    fits,
    length_mask,
    pad,
    render,
    shuffled_batches,
    similar_lengths,
)
from training.metrics import Metrics
from training.model import RewardModel, load_tokenizer
from training.objectives import ranking_loss, strict_pairs
from training.optimizer import adam, autocast, cosine_share, set_rate

FORWARD_ROWS = 32


@dataclass(frozen=True)
class Ranked:
    """One ranked prompt as tokens; `ranks` aligned with `responses`, 0 best, ties equal."""

    user_id: str
    rater_id: str
    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int, ...]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt + response for response in self.responses]


def train_reward_model(
    config: RewardModelConfig,
    parent: Path,
    rows: Sequence[RankedRow],
    demonstrations: Sequence[SftRow],
    folder: Path,
    metrics: Metrics,
) -> None:
    """Train on `rows`, starting from the policy in `parent`, and save into the new folder `folder`.

    The mean score of `demonstrations` becomes the checkpoint's shift, so that they score 0 on
    average.
    """
    torch.manual_seed(config.seed)
    tokenizer, model = load_tokenizer(parent), RewardModel.from_policy(parent)
    ranked = encode_rankings(config, tokenizer, rows)
    zero = demonstration_sequences(config, tokenizer, demonstrations)
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
    optimizer = adam(model.parameters(), config.learning_rate)

    rng = random.Random(config.seed)
    size = config.prompts_per_batch
    batches = [b for _ in range(config.epochs) for b in shuffled_batches(len(ranked), size, rng)]
    model.eval()  # no dropout
    for step, batch in enumerate(batches):
        set_rate(
            optimizer,
            config.learning_rate * cosine_share(step, len(batches), config.final_rate_share),
        )
        with autocast(config.precision):
            scores_BK, ranks_BK, mask_BK = _score(model, [ranked[i] for i in batch])
            loss = ranking_loss(scores_BK, ranks_BK, mask_BK)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pairs_BKK = strict_pairs(ranks_BK, mask_BK)
        right_BKK = pairs_BKK & (scores_BK[:, :, None] > scores_BK[:, None, :])
        accuracy = right_BKK.sum() / pairs_BKK.sum().clamp(min=1)
        metrics.write(step, loss=loss.item(), accuracy=accuracy.item(), grad_norm=norm.item())

    model.shift += mean_score(model, zero)
    model.save(folder, tokenizer)


def encode_rankings(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[RankedRow]
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


def _score(model: RewardModel, batch: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ranks and mask, all [B, K], of a batch of rankings with up to K responses each."""
    sequences = [s for ranked in batch for s in ranked.sequences]
    # Forward passes of similar lengths, so that little of them is padding.
    parts = similar_lengths([len(s) for s in sequences], FORWARD_ROWS)
    scores = torch.cat([model(*pad([sequences[i] for i in part])) for part in parts])
    order = torch.tensor([i for part in parts for i in part])
    scores_N = torch.zeros_like(scores).index_put((order,), scores)
    mask_BK = length_mask(torch.tensor([len(r.ranks) for r in batch]))
    scores_BK = torch.zeros(mask_BK.shape).masked_scatter(mask_BK, scores_N)
    ranks_BK, _ = pad([r.ranks for r in batch])
    return scores_BK, ranks_BK, mask_BK


@torch.no_grad()
def score_sequences(
    model: RewardModel, sequences: Sequence[Sequence[int]], batch: int = 64
) -> Tensor:
    """Scores, float32 [N], of whole sequences (prompt and response), in the order given."""
    scores_N = torch.empty(len(sequences))
    for indices in similar_lengths([len(s) for s in sequences], batch):
        scores_N[indices] = model(*pad([sequences[i] for i in indices]))
    return scores_N


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
    scores = iter(score_sequences(model, [s for r in ranked for s in r.sequences]).tolist())
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
