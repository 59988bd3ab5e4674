"""Pure maths of the three steps: Bradley-Terry over K, KL reward, GAE, clipped PPO, the ptx mix.

Shapes: B sequences, R response tokens (right-padded), K ranked responses of one prompt. A mask is
True at real tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from training.kernels import discounted_sums


def ranking_loss(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """InstructGPT's equation 1: the mean of -log sigmoid(r_w - r_l) over the pairs of a prompt,
    then over prompts.

    All pairs of a prompt are one batch element, so that a prompt with K = 9 weighs as much as one
    with K = 4. Tied pairs are dropped; the mean is over the pairs that remain, and a prompt without
    any is left out.
    """
    better_BKK = strict_pairs(ranks_BK, mask_BK)
    gaps_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    losses_BKK = torch.where(better_BKK, -F.logsigmoid(gaps_BKK), 0.0)
    pairs_B = better_BKK.sum((1, 2))
    losses_B = losses_BKK.sum((1, 2)) / pairs_B.clamp(min=1)
    return losses_B.sum() / (pairs_B > 0).sum().clamp(min=1)


def strict_pairs(ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """[B, K, K], True at (i, j) where response i is ranked strictly above j. Rank 0 is best."""
    real_BKK = mask_BK[:, :, None] & mask_BK[:, None, :]
    return (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & real_BKK


def kl_rewards(
    scores_B: Tensor, logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor, beta: float
) -> Tensor:
    """reward[t] = -beta * (logp - ref_logp), and the score added at each response's last token
    (recipe, detail 12).
    """
    rewards_BR = -beta * (logprobs_BR - ref_logprobs_BR) * mask_BR
    last_B = mask_BR.sum(1) - 1
    return rewards_BR.scatter_add(1, last_B[:, None], scores_B[:, None])


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): advantages and returns, both [B, R], 0
    beyond the end.

    The value after the last token is 0: an episode ends with its response.
    """
    values_BR = values_BR * mask_BR
    deltas_BR = rewards_BR - values_BR
    deltas_BR[:, :-1].add_(values_BR[:, 1:], alpha=gamma)
    # Nothing comes from beyond the end, so nothing has to be masked afterwards.
    advantages_BR = discounted_sums(deltas_BR.mul_(mask_BR), gamma * lam)
    return advantages_BR, advantages_BR + values_BR


def whiten(values_BR: Tensor, mask_BR: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance over the real tokens (biased estimate); the mean goes to 0, or stays with
    `shift_mean=False`.
    """
    mean = masked_mean(values_BR, mask_BR)
    variance = masked_mean((values_BR - mean) ** 2, mask_BR)
    whitened_BR = (values_BR - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened_BR if shift_mean else whitened_BR + mean) * mask_BR


def masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Mean over the real tokens of the whole batch."""
    return (values_BR * mask_BR).sum() / mask_BR.sum().clamp(min=1)


def policy_losses(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) of every token, any shape."""
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Where `policy_losses` has no gradient, because the clipped loss is the larger one."""
    return torch.where(advantages > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantages < 0))


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 * max(squared error, squared error of the value clipped around the old), of every token,
    any shape.
    """
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def explained_variance(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the real tokens; 1 is perfect, 0 no better than
    a constant.
    """
    returns, errors = returns_BR[mask_BR], (returns_BR - values_BR)[mask_BR]
    return float(1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8))
