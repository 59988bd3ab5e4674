"""Attention by FlexAttention (arXiv 2412.05496), which stores no matrix of scores; for cards.

Shapes as in training.attention.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from training.device import across
from training.packing import Packed


def seen_by(packed: Packed, queries_Q: Tensor | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries looks at: a token its own segment up to itself,
    and the prompt before it.
    """
    asked_Q = torch.arange(len(packed)) if queries_Q is None else queries_Q
    own_N, prompt_N, at_Q = across((*packed.segments(), asked_Q), device)

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = at_Q[query]
        return (key <= at) & ((own_N[key] == own_N[at]) | (own_N[key] == prompt_N[at]))

    return create_block_mask(seen, None, None, len(at_Q), len(packed), device=device)


def attention(q_AQD: Tensor, k_aND: Tensor, v_aND: Tensor, seen: BlockMask, scale: float) -> Tensor:
    """softmax(scale * q k) v over what each query may see, [Q, A, D]."""
    q, k, v = (x.to(v_aND.dtype)[None] for x in (q_AQD, k_aND, v_aND))
    compute = _compute(fused=q.is_cuda)
    out: Tensor = compute(q, k, v, block_mask=seen, scale=scale, enable_gqa=True)[0]
    return out.transpose(0, 1)


@cache
def _compute(fused: bool) -> Any:
    # For all lengths at once: hardly two passes are equally long.
    return torch.compile(flex_attention, dynamic=True) if fused else flex_attention
