"""Log-probability and its gradient from a chunk of logits: each row is read once, then once more.

The products around it are the library's (cuBLAS), whose tiles nothing here would beat; between them
only one chunk of logits exists.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# Below every logit but minus infinity, so that no difference is undefined.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


def statistics_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The normaliser is the log-sum-exp; the logits stay."""
    rows, columns = logits_CV.shape
    logprobs_C, lse_C = logits_CV.new_empty(rows), logits_CV.new_empty(rows)
    _statistics[(rows,)](logits_CV, targets_C, logprobs_C, lse_C, columns, BLOCK)
    return logprobs_C, lse_C


def logits_gradient_(
    logits_CV: Tensor, targets_C: Tensor, lse_C: Tensor, slopes_C: Tensor
) -> Tensor:
    rows, columns = logits_CV.shape
    grid = (rows, triton.cdiv(columns, BLOCK))
    _gradient[grid](logits_CV, targets_C, lse_C, slopes_C, columns, BLOCK)
    return logits_CV


@triton.jit
def _statistics(logits, targets, logprobs, lses, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # Of every column of the block: the running maximum, and the sum of exp(z - maximum).
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        z = tl.load(logits + row * columns + start + at, mask=inside, other=LOWEST)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.where(inside, tl.exp(z - higher), 0.0)
        top = higher
    highest = tl.max(top, 0)
    total = total * tl.exp(top - highest)
    lse = highest + tl.log(tl.sum(total, 0))
    chosen = tl.load(logits + row * columns + tl.load(targets + row))
    tl.store(logprobs + row, chosen - lse)
    tl.store(lses + row, lse)


@triton.jit
def _gradient(logits, targets, lses, slopes, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    slope = tl.load(slopes + row)
    z = tl.load(logits + row * columns + at, mask=inside, other=float("-inf"))
    onehot = tl.where(at == tl.load(targets + row), 1.0, 0.0)
    gradient = slope * (onehot - tl.exp(z - tl.load(lses + row)))
    tl.store(logits + row * columns + at, gradient, mask=inside)
