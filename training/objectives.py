"""Pure maths of PPO beside the kernels: the clipped losses, explained variance.

Shapes: B sequences, R response tokens (right-padded). A mask is True at real tokens.
"""

import torch
from torch import Tensor


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
