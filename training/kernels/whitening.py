"""Masked whitening in two passes: sums of blocks in a fixed order, then the values.

Mean and variance are those of blocks, merged as Chan et al. do, so that nothing cancels and the
result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def whiten(values_BR: Tensor, mask_BR: Tensor, shift_mean: bool) -> Tensor:
    values_BR, mask_BR = values_BR.contiguous(), mask_BR.contiguous()
    size = values_BR.numel()
    blocks = triton.cdiv(size, BLOCK)
    parts = values_BR.new_empty(3, blocks)
    whitened_BR = torch.empty_like(values_BR)
    _moments[(blocks,)](values_BR, mask_BR, parts, size, blocks, BLOCK)
    width = triton.next_power_of_2(blocks)
    _apply[(blocks,)](
        values_BR, mask_BR, parts, whitened_BR, size, blocks, shift_mean, BLOCK, width
    )
    return whitened_BR


@triton.jit
def _moments(values, mask, parts, size, blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(mask + at, mask=at < size, other=0).to(tl.float32)
    value = tl.load(values + at, mask=at < size, other=0.0) * real
    count = tl.sum(real, 0)
    mean = tl.sum(value, 0) / tl.maximum(count, 1.0)
    apart = (value - mean) * real
    tl.store(parts + block, count)
    tl.store(parts + blocks + block, mean)
    tl.store(parts + 2 * blocks + block, tl.sum(apart * apart, 0))


@triton.jit
def _apply(  # noqa: PLR0913, PLR0917
    values,
    mask,
    parts,
    whitened,
    size,
    blocks,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    of = tl.arange(0, WIDTH)
    counts = tl.load(parts + of, mask=of < blocks, other=0.0)
    means = tl.load(parts + blocks + of, mask=of < blocks, other=0.0)
    squares = tl.load(parts + 2 * blocks + of, mask=of < blocks, other=0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    mean = tl.sum(counts * means, 0) / count
    variance = tl.sum(squares + counts * (means - mean) * (means - mean), 0) / count
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(mask + at, mask=at < size, other=0).to(tl.float32)
    value = tl.load(values + at, mask=at < size, other=0.0)
    result = (value - mean) / tl.sqrt(variance + 1e-8)
    result += tl.where(SHIFT_MEAN, 0.0, mean)
    tl.store(whitened + at, result * real, mask=at < size)
