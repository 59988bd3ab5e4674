"""PPO's clipped losses with their slopes: every token is read once, in one launch each.

The policy's loss lies in the head, between a chunk's logits and their gradient, and the value's
behind another network: they are two launches, never one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def policy_losses(logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    losses_N: Tensor = _Clipped.apply(_policy, logprobs_N, old_N, advantages_N, clip)  # type: ignore[no-untyped-call]
    return losses_N


def value_losses(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    losses_N: Tensor = _Clipped.apply(_value, values_N, old_N, returns_N, clip)  # type: ignore[no-untyped-call]
    return losses_N


class _Clipped(torch.autograd.Function):
    """The loss of every token and, formed beside it, its derivative at `new_N`."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, new_N: Tensor, old_N: Tensor, target_N: Tensor, clip: float
    ) -> Tensor:
        new_N, old_N, target_N = (x.contiguous() for x in (new_N, old_N, target_N))
        losses_N, slopes_N = torch.empty_like(new_N), torch.empty_like(new_N)
        size = new_N.numel()
        kernel[(triton.cdiv(size, BLOCK),)](
            new_N, old_N, target_N, losses_N, slopes_N, size, clip, BLOCK
        )
        ctx.save_for_backward(slopes_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        return None, ctx.saved_tensors[0] * grads[0], None, None, None


@triton.jit
def _policy(logprobs, old, advantages, losses, slopes, size, clip, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    advantage = tl.load(advantages + at, mask=inside, other=0.0)
    before = tl.load(old + at, mask=inside, other=0.0)
    ratio = tl.exp(tl.load(logprobs + at, mask=inside, other=0.0) - before)
    near = tl.minimum(tl.maximum(ratio, 1.0 - clip), 1.0 + clip)
    plain, cut = -advantage * ratio, -advantage * near
    tl.store(losses + at, tl.maximum(plain, cut), mask=inside)
    # d ratio / d logprob = ratio; where the cut loss is the larger one, nothing flows.
    tl.store(slopes + at, tl.where(plain >= cut, plain, 0.0), mask=inside)


@triton.jit
def _value(values, old, returns, losses, slopes, size, clip, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(values + at, mask=inside, other=0.0)
    before = tl.load(old + at, mask=inside, other=0.0)
    target = tl.load(returns + at, mask=inside, other=0.0)
    step = tl.minimum(tl.maximum(value - before, -clip), clip)
    error, cut = value - target, before + step - target
    tl.store(losses + at, 0.5 * tl.maximum(error * error, cut * cut), mask=inside)
    # Where the clipped error is the larger one, the value has left the clip: nothing flows.
    tl.store(slopes + at, tl.where(error * error >= cut * cut, error, 0.0), mask=inside)
