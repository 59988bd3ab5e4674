"""The K-way pairwise loss and its gradient: one program a prompt."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def ranking_loss(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    loss: Tensor = _RankingLoss.apply(scores_BK, ranks_BK, mask_BK)  # type: ignore[no-untyped-call]
    return loss


class _RankingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
        prompts, count = scores_BK.shape
        losses_B, slopes_BK = scores_BK.new_empty(prompts), torch.empty_like(scores_BK)
        # -1 where there is no pair, so that one sum and one count end it.
        width = max(2, triton.next_power_of_2(count))
        _pairs[(prompts,)](scores_BK, ranks_BK, mask_BK, losses_B, slopes_BK, count, width)
        some_B = losses_B >= 0
        prompts_with_pairs = some_B.sum().clamp(min=1)
        ctx.save_for_backward(slopes_BK / prompts_with_pairs)
        return (losses_B * some_B).sum() / prompts_with_pairs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


@triton.jit
def _pairs(scores, ranks, mask, losses, slopes, count, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    place, inside = row * count + at, at < count
    score = tl.load(scores + place, mask=inside, other=0.0)
    rank = tl.load(ranks + place, mask=inside, other=0)
    real = tl.load(mask + place, mask=inside, other=0) != 0
    better = (rank[:, None] < rank[None, :]) & real[:, None] & real[None, :]
    weight = better.to(tl.float32)
    pairs = tl.sum(tl.sum(weight, 1), 0)
    weight = weight / tl.maximum(pairs, 1.0)
    gap = score[:, None] - score[None, :]
    # softplus(-gap) without overflow.
    loss = tl.maximum(-gap, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(gap)))
    pull = weight / (1.0 + tl.exp(gap))
    tl.store(losses + row, tl.where(pairs > 0, tl.sum(tl.sum(loss * weight, 1), 0), -1.0))
    tl.store(slopes + place, tl.sum(pull, 0) - tl.sum(pull, 1), mask=inside)
