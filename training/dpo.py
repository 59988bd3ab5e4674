"""Rankings > policy without a reward model: DPO (Rafailov et al., arXiv 2305.18290), a baseline for
PPO on the same rankings.

Shapes: P responses of all rankings of a batch, M their tokens; B rankings of up to K responses.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contracts.errors import InvalidInput
from training.checkpoint import Checkpoint, Stateful
from training.config import DpoConfig
from training.data import RankedRow, length_mask, pad, shuffled_batches
from training.device import Precision, across, device_of
from training.kernels import ranking_loss, strict_pairs
from training.metrics import Metrics
from training.model import (
    Pair,
    load_tokenizer,
    load_trainable,
    pack_pairs,
    packed_loss,
    response_logprobs,
    save_policy,
)
from training.optimizer import adam, autocast, cosine_share, set_rate, step
from training.packing import PASS_TOKENS, Tree, passes
from training.reward_model import Ranked, encode_rankings


def train_dpo(
    config: DpoConfig, parent: Path, rows: Sequence[RankedRow], folder: Path, metrics: Metrics
) -> None:
    """Train the policy in `parent`, which is the reference as well, on `rows`, and save it into the
    new folder `folder`. Goes on from its checkpoint where there is one.
    """
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(parent)
    model = load_trainable(parent, config.lora, config.seed, config.device).eval()
    ranked = encode_rankings(config, tokenizer, rows)
    if not ranked:
        raise InvalidInput(
            "DPO rankings", "at least one with two ranks", f"{len(rows)} rows, none usable"
        )
    reference = [log_likelihoods(model, pairs_of([r]), config.precision) for r in ranked]
    optimizer = adam(model.parameters(), config.learning_rate)

    rng, size = random.Random(config.seed), config.prompts_per_batch
    batches = [b for _ in range(config.epochs) for b in shuffled_batches(len(ranked), size, rng)]
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "metrics": metrics}
    progress = Checkpoint(folder, config, ranked, parts)
    done = progress.restore()
    for i, batch in enumerate(batches[done:], done):
        rate = config.learning_rate * cosine_share(i, len(batches), config.final_rate_share)
        set_rate(optimizer, rate)
        reference_P = torch.cat([reference[r] for r in batch])
        figures = accumulate_gradients(config, model, [ranked[r] for r in batch], reference_P)
        norm = step(model, optimizer, config.max_grad_norm)
        metrics.write(i, **figures, grad_norm=norm.item())
        progress.save(i + 1)
    save_policy(model, tokenizer, folder)


def accumulate_gradients(
    config: DpoConfig, model: PreTrainedModel, ranked: Sequence[Ranked], reference_P: Tensor
) -> dict[str, float]:
    """The gradient of the reward model's loss on beta * log(policy / reference), the reward of
    which the policy is the optimum (equation 5 there); loss and pair accuracy.
    """
    # 1. The rewards, and the loss's slope at each.
    pairs, mask_BK = pairs_of(ranked), length_mask(torch.tensor([len(r.ranks) for r in ranked]))
    device = device_of(model)
    described = pad([r.ranks for r in ranked])[0], mask_BK, mask_BK.nonzero(as_tuple=True)
    ranks_BK, mask_BK, places = across(described, device)
    rewards_P = config.beta * (log_likelihoods(model, pairs, config.precision) - reference_P)
    rewards_BK = rewards_P.new_zeros(mask_BK.shape).index_put(places, rewards_P).requires_grad_()
    loss = ranking_loss(rewards_BK, ranks_BK, mask_BK)
    [slopes_BK] = torch.autograd.grad(loss, rewards_BK)

    # 2. Every token of a response has the slope of its sum.
    slopes_P = config.beta * slopes_BK[places]
    length_P = torch.tensor([len(response) for _, response in pairs])
    for part in passes([Tree([*prompt, *response]) for prompt, response in pairs], PASS_TOKENS):
        pair_M = torch.tensor(part).repeat_interleave(length_P[part])
        slopes_M = slopes_P[across(pair_M, device)]
        with autocast(config.precision, device):
            inputs = pack_pairs([pairs[i] for i in part])
            weighted, _ = packed_loss(model, *inputs, partial(_weighted, slopes_M))
        weighted.backward()

    better_BKK = strict_pairs(ranks_BK, mask_BK)
    right = better_BKK & (rewards_BK[:, :, None] > rewards_BK[:, None, :])
    accuracy = right.sum() / better_BKK.sum()
    return dict(zip(("loss", "accuracy"), torch.stack([loss, accuracy]).tolist(), strict=True))


def pairs_of(ranked: Sequence[Ranked]) -> list[Pair]:
    """Prompt and response of every response, in their order."""
    return [(r.prompt, response) for r in ranked for response in r.responses]


def log_likelihoods(model: PreTrainedModel, pairs: Sequence[Pair], precision: Precision) -> Tensor:
    """Of every response given its prompt, float32 [P], in nats; no gradient."""
    with autocast(precision, device_of(model)):
        return torch.stack([logprobs_R.sum() for logprobs_R in response_logprobs(model, pairs)])


def _weighted(slopes_M: Tensor, logprobs_C: Tensor, at: slice) -> Tensor:
    return logprobs_C * slopes_M[at]
