"""A Llama on packed trees: no padding, and in the last layer only what is asked for.

Shapes: N tokens, M of them asked for, A query heads, a key heads, D width of a head, H of the
model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from training import ranks
from training.attention import Seen, attention, seen_by
from training.device import across, device_of
from training.packing import Packed


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
    device = device_of(backbone)
    seen, seen_last = seen_by(packed, None, device), seen_by(packed, at_M, device)
    tokens_N, positions_N, at_M = across((packed.tokens_N, packed.positions_N, at_M), device)
    x_NH = backbone.embed_tokens(tokens_N)
    cos, sin = backbone.rotary_emb(x_NH[None], positions_N[None])
    rotary = cos[0], sin[0]
    *layers, last = backbone.layers
    again = last.gradient_checkpointing and torch.is_grad_enabled()
    compute = _recomputed if again else _layer
    for layer in layers:
        x_NH = ranks.gathered(layer, compute, x_NH, rotary, seen, None)
    x_MH = ranks.gathered(last, compute, x_NH, rotary, seen_last, at_M)
    normed: Tensor = _norm(backbone.norm, x_MH)
    return normed


def _layer(
    layer: Any,
    x_NH: Tensor,
    rotary: tuple[Tensor, Tensor],
    seen: Seen,
    at_M: Tensor | None,
) -> Tensor:
    """One decoder layer; with `at_M`, keys and values of all tokens but the rest of those alone."""
    attend, mlp = layer.self_attn, layer.mlp
    h_NH = _norm(layer.input_layernorm, x_NH)
    asked, at = (h_NH, rotary) if at_M is None else (h_NH[at_M], (rotary[0][at_M], rotary[1][at_M]))
    q_MAD, k_NaD, v_NaD = (
        x.view(len(x), -1, attend.head_dim)
        for x in (attend.q_proj(asked), attend.k_proj(h_NH), attend.v_proj(h_NH))
    )
    q_AMD, k_aND, v_aND = _rotate(q_MAD, *at), _rotate(k_NaD, *rotary), v_NaD.transpose(0, 1)
    out_MAD = attention(q_AMD, k_aND, v_aND, seen, attend.scaling)
    x_MH = x_NH if at_M is None else x_NH[at_M]
    x_MH = x_MH + attend.o_proj(out_MAD.flatten(1))
    h_MH = _norm(layer.post_attention_layernorm, x_MH)
    out_MH: Tensor = x_MH + mlp.down_proj(F.silu(mlp.gate_proj(h_MH)) * mlp.up_proj(h_MH))
    return out_MH


def _recomputed(layer: Any, *args: Any) -> Tensor:
    """`_layer`, which the backward pass computes again, with the same dropout where there is any.

    Where there is none, random numbers are left to others: an engine may draw some meanwhile.
    """
    out_MH: Tensor = checkpoint(
        _layer, layer, *args, use_reentrant=False, preserve_rng_state=layer.training
    )
    return out_MH


def _norm(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def _rotate(x: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """[heads, N, D]: each head's halves turned by the angle of its position."""
    cos_ND, sin_ND = cos_ND.to(x.dtype), sin_ND.to(x.dtype)
    turned: Tensor = Rotary.apply(x, cos_ND, sin_ND)  # type: ignore[no-untyped-call]
    return turned


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight; under autocast the result is already in the type that is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (x * inverse).mul_(weight)
        cast = torch.is_autocast_enabled(x.device.type)
        return normed.to(torch.get_autocast_dtype(x.device.type)) if cast else normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        unit = x * inverse
        along = grad * unit
        mean = torch.mv(along, weight).div_(x.shape[-1])[:, None]
        dx = (grad * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
        return dx, along.sum(0) if ctx.needs_input_grad[1] else None, None


class Rotary(torch.autograd.Function):
    """[N, heads, D] > [heads, N, D], turned; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cos_ND, sin_ND)
        return _turn(x.transpose(0, 1), cos_ND, sin_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_ND, sin_ND = ctx.saved_tensors
        cos_N1D, sin_N1D = cos_ND[:, None], sin_ND[:, None]
        return _turn(grads[0].transpose(0, 1), cos_N1D, -sin_N1D), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x.new_empty(x.shape)
    for ours, theirs, sign in (
        (slice(half), slice(half, None), -1),
        (slice(half, None), slice(half), 1),
    ):
        part = torch.mul(x[..., ours], cos[..., ours], out=out[..., ours])
        part.addcmul_(x[..., theirs], sin[..., ours], value=sign)
    return out
