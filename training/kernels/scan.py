"""GAE as a scan in one launch: one program a row, from its end on, a block of tokens at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def gae(rewards_BR: Tensor, values_BR: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards_BR, values_BR = rewards_BR.contiguous(), values_BR.contiguous()
    rows, width = rewards_BR.shape
    advantages_BR, returns_BR = torch.empty_like(rewards_BR), torch.empty_like(rewards_BR)
    _gae[(rows,)](rewards_BR, values_BR, advantages_BR, returns_BR, width, gamma, lam, BLOCK)
    return advantages_BR, returns_BR


@triton.jit
def _join(decay_a, sum_a, decay_b, sum_b):
    """What a pair of stretches does together: b follows a in the order of the scan."""
    return decay_a * decay_b, sum_a * decay_b + sum_b


@triton.jit
def _gae(rewards, values, advantages, returns, width, gamma, lam, BLOCK: tl.constexpr):
    start_of_row = tl.program_id(0).to(tl.int64) * width
    order = tl.arange(0, BLOCK)
    carry = 0.0
    for start in range(0, width, BLOCK):
        # Counted from the end, so that the scan runs forward.
        at = width - 1 - start - order
        inside = at >= 0
        place = start_of_row + at
        value = tl.load(values + place, mask=inside, other=0.0)
        following = tl.load(values + place + 1, mask=inside & (at + 1 < width), other=0.0)
        delta = tl.load(rewards + place, mask=inside, other=0.0) + gamma * following - value
        powers, inner = tl.associative_scan((tl.zeros_like(delta) + gamma * lam, delta), 0, _join)
        advantage = inner + powers * carry
        tl.store(advantages + place, advantage, mask=inside)
        tl.store(returns + place, advantage + value, mask=inside)
        carry = tl.sum(tl.where(order == BLOCK - 1, advantage, 0.0), 0)
