"""The scan of GAE: one program a row, from the end to the start, a block of tokens at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def discounted_sums(x_BR: Tensor, decay: float) -> Tensor:
    x_BR = x_BR.contiguous()
    rows, width = x_BR.shape
    sums_BR = torch.empty_like(x_BR)
    _scan[(rows,)](x_BR, sums_BR, width, decay, BLOCK)
    return sums_BR


@triton.jit
def _join(decay_a, sum_a, decay_b, sum_b):
    """What a pair of stretches does together: b follows a in the order of the scan."""
    return decay_a * decay_b, sum_a * decay_b + sum_b


@triton.jit
def _scan(x, sums, width, decay, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    carry = 0.0
    for start in range(0, width, BLOCK):
        # Counted from the end, so that the scan runs forward.
        at = width - 1 - start - tl.arange(0, BLOCK)
        value = tl.load(x + row * width + at, mask=at >= 0, other=0.0)
        powers, inner = tl.associative_scan((tl.zeros_like(value) + decay, value), 0, _join)
        result = inner + powers * carry
        tl.store(sums + row * width + at, result, mask=at >= 0)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, result, 0.0), 0)
