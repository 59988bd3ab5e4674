"""A Llama on packed trees: no padding, and in the last layer only what is asked for.

Shapes: N tokens, M of them asked for, A query heads, a key heads, D width of a head, H of the
model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from training.attention import attention
from training.packing import Group, Packed


def is_llama(backbone: PreTrainedModel) -> bool:
    """Whether the computation below is that of this model."""
    config = backbone.config
    return (
        config.model_type in {"llama", "qwen2"}
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
    )


def hidden_states(backbone: Any, packed: Packed, at_M: Tensor) -> Tensor:
    """The last hidden states, [M, H], at the tokens `at_M` (ascending)."""
    x_NH = backbone.embed_tokens(packed.tokens_N)
    cos, sin = backbone.rotary_emb(x_NH[None], packed.positions_N[None])
    rotary = cos[0], sin[0]
    groups = packed.groups()
    *layers, last = backbone.layers
    for layer in layers:
        x_NH = _layer(layer, x_NH, rotary, groups, None)
    x_MH = _layer(last, x_NH, rotary, packed.groups(at_M), at_M)
    normed: Tensor = _norm(backbone.norm, x_MH)
    return normed


def _layer(
    layer: Any,
    x_NH: Tensor,
    rotary: tuple[Tensor, Tensor],
    groups: list[Group],
    at_M: Tensor | None,
) -> Tensor:
    """One decoder layer; with `at_M`, keys and values of all tokens but the rest of those alone."""
    attend, mlp = layer.self_attn, layer.mlp
    h_NH = _norm(layer.input_layernorm, x_NH)
    asked, at = (h_NH, rotary) if at_M is None else (h_NH[at_M], (rotary[0][at_M], rotary[1][at_M]))
    q_AMD = _rotate(_heads(attend.q_proj(asked), attend.head_dim), *at)
    k_aND = _rotate(_heads(attend.k_proj(h_NH), attend.head_dim), *rotary)
    v_aND = _heads(attend.v_proj(h_NH), attend.head_dim)
    out_MAD = attention(q_AMD, k_aND, v_aND, groups, attend.scaling)
    x_MH = x_NH if at_M is None else x_NH[at_M]
    x_MH = x_MH + attend.o_proj(out_MAD.flatten(1))
    h_MH = _norm(layer.post_attention_layernorm, x_MH)
    out_MH: Tensor = x_MH + mlp.down_proj(F.silu(mlp.gate_proj(h_MH)) * mlp.up_proj(h_MH))
    return out_MH


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _heads(x: Tensor, width: int) -> Tensor:
    return x.view(len(x), -1, width).transpose(0, 1)


def _rotate(x_AND: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    left, right = x_AND.chunk(2, -1)
    return x_AND * cos_ND + torch.cat((-right, left), -1) * sin_ND
