"""Pure maths of PPO on top of the kernels: GAE, the clipped losses, explained variance.

Shapes: B sequences, R response tokens (right-padded). A mask is True at real tokens.
"""

import torch
from torch import Tensor

from training.kernels import discounted_sums


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
