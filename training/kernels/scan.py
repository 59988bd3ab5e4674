"""Sums of what is still to come, discounted: the scan behind GAE.

Shapes: B rows of R, cut into N blocks of S.
"""

import torch
from torch import Tensor

BLOCK = 32


def discounted_sums(x_BR: Tensor, decay: float) -> Tensor:
    """y[t] = x[t] + decay * y[t + 1], along the last axis; float32 [B, R].

    A block is one product with a triangular matrix of powers; what a block passes on to those
    before it is a scan again, over the blocks.
    """
    rows, width = x_BR.shape
    if width <= BLOCK:
        return x_BR @ _powers(width, decay)
    padded = -(-width // BLOCK) * BLOCK
    x_BR = x_BR if padded == width else torch.nn.functional.pad(x_BR, (0, padded - width))
    y_NS = x_BR.reshape(-1, BLOCK) @ _powers(BLOCK, decay)
    y_BNS = y_NS.view(rows, -1, BLOCK)
    from_BN = discounted_sums(y_BNS[:, :, 0].contiguous(), decay**BLOCK)
    reach_S = decay ** torch.arange(BLOCK, 0, -1, dtype=torch.float32)
    y_BNS[:, :-1].addcmul_(from_BN[:, 1:, None], reach_S)
    return y_BNS.view(rows, padded)[:, :width]


def _powers(size: int, decay: float) -> Tensor:
    """[S, S]: decay^(s - t) at (s, t) for s >= t, 0 above."""
    at = torch.arange(size)
    return torch.where(at[:, None] >= at, decay ** (at[:, None] - at).clamp(min=0).float(), 0.0)
