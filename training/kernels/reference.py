"""The eager twin of every kernel: what runs on a CPU, and what a kernel must give.

Shapes: B sequences of R response tokens, right-padded; K ranked responses of one prompt; C tokens
of a chunk, V vocabulary. A mask is True at real tokens.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the scan: a block is one product with a triangular matrix, and so many tokens fit the cache.
BLOCK, SCANNED = 16, 1 << 18


def statistics_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.statistics_`: the logits become exp(z - max), the normaliser their sum."""
    logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
    chosen_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    total_C = logits_CV.exp_().sum(-1)
    return chosen_C - total_C.log(), total_C


def logits_gradient_(
    exp_CV: Tensor, targets_C: Tensor, total_C: Tensor, slopes_C: Tensor
) -> Tensor:
    """See `kernels.logits_gradient_`."""
    exp_CV.mul_((-slopes_C / total_C)[:, None])
    return exp_CV.scatter_add_(1, targets_C[:, None], slopes_C[:, None])


def entropies(logits_CV: Tensor) -> Tensor:
    """-sum p log p of every row, in nats, float32 [C]."""
    logprobs_CV = logits_CV.log_softmax(-1)
    entropies_C: Tensor = -torch.linalg.vecdot(logprobs_CV.exp(), logprobs_CV)
    return entropies_C


def gae(rewards_BR: Tensor, values_BR: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """See `kernels.gae`, by way of the returns, which are one scan of what is known:
    G[t] = r[t] + gamma * ((1 - lam) * V[t + 1] + lam * G[t + 1]).

    A few rows at a time, so that what lies between two steps stays in the cache.
    """
    advantages_BR, returns_BR = rewards_BR.new_empty(2, *rewards_BR.shape)
    rows = max(1, SCANNED // max(1, rewards_BR.shape[1]))
    for start in range(0, len(rewards_BR), rows):
        at = slice(start, start + rows)
        known_BR = rewards_BR[at].clone()
        known_BR[:, :-1].add_(values_BR[at, 1:], alpha=gamma * (1 - lam))
        returns_BR[at] = _discounted_sums_(known_BR, gamma * lam)
        torch.sub(returns_BR[at], values_BR[at], out=advantages_BR[at])
    return advantages_BR, returns_BR


def _discounted_sums_(x_BR: Tensor, decay: float) -> Tensor:
    """y[t] = x[t] + decay * y[t + 1], along the last axis; x may be overwritten.

    A block is one product with a triangular matrix of powers. What comes from behind a block is a
    scan again, over the blocks, and enters with its last token.
    """
    rows, width = x_BR.shape
    if width <= BLOCK:
        return x_BR @ _powers(width, decay, x_BR.device)
    padded = -(-width // BLOCK) * BLOCK
    x_BR = x_BR if padded == width else F.pad(x_BR, (0, padded - width))
    x_NS, powers = x_BR.view(-1, BLOCK), _powers(BLOCK, decay, x_BR.device)
    from_BN = _discounted_sums_((x_NS @ powers[:, 0]).view(rows, -1), decay**BLOCK)
    x_BR.view(rows, -1, BLOCK)[:, :-1, -1].add_(from_BN[:, 1:], alpha=decay)
    return (x_NS @ powers).view(rows, padded)[:, :width]


@functools.lru_cache(maxsize=64)
def _powers(size: int, decay: float, device: torch.device) -> Tensor:
    """decay^(s - t) at (s, t) for s >= t, 0 above; its columns are contiguous."""
    at = torch.arange(size, device=device)
    powers = torch.where(at >= at[:, None], decay ** (at - at[:, None]).clamp(min=0).float(), 0.0)
    return powers.T


def policy_losses(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """See `kernels.policy_losses`."""
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Where `policy_losses` has no gradient, because the clipped loss is the larger one."""
    return torch.where(advantages > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantages < 0))


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """See `kernels.value_losses`."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Mean over the real tokens of the whole batch."""
    return (values_BR * mask_BR).sum() / mask_BR.sum().clamp(min=1)


def whiten(values_BR: Tensor, mask_BR: Tensor, shift_mean: bool) -> Tensor:
    """See `kernels.whiten`."""
    mean = masked_mean(values_BR, mask_BR)
    variance = masked_mean((values_BR - mean) ** 2, mask_BR)
    whitened_BR = (values_BR - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened_BR if shift_mean else whitened_BR + mean) * mask_BR


def kl_rewards(
    scores_B: Tensor, logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor, beta: float
) -> Tensor:
    """See `kernels.kl_rewards`."""
    rewards_BR = -beta * (logprobs_BR - ref_logprobs_BR) * mask_BR
    last_B = mask_BR.sum(1) - 1
    return rewards_BR.scatter_add(1, last_B[:, None], scores_B[:, None])


def strict_pairs(ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """[B, K, K], True at (i, j) where response i is ranked strictly above j. Rank 0 is best."""
    real_BKK = mask_BK[:, :, None] & mask_BK[:, None, :]
    return (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & real_BKK


class RankingLoss(torch.autograd.Function):
    """See `kernels.ranking_loss`; the gradient is formed with the loss."""

    @staticmethod
    def forward(ctx: Any, scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
        better_BKK = strict_pairs(ranks_BK, mask_BK)
        pairs_B = better_BKK.sum((1, 2))
        prompts = (pairs_B > 0).sum().clamp(min=1)
        weights_BKK = better_BKK.to(scores_BK.dtype)
        weights_BKK /= (pairs_B.clamp(min=1) * prompts)[:, None, None]
        gaps_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
        pull_BKK = torch.sigmoid(-gaps_BKK) * weights_BKK
        ctx.save_for_backward(pull_BKK.sum(1) - pull_BKK.sum(2))
        return (F.softplus(-gaps_BKK) * weights_BKK).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None
