"""Attention over packed trees: every token sees its own sequence, and a response its prompt too.

On a card FlexAttention computes it. On a CPU, which that has no backward pass for, trees of like
shape are computed at once: padded groups, whose scores are kept.

Shapes: A query heads, a key heads (A is a multiple of a), D width of a head, N tokens, Q queries;
G, K, P, R and T as in training.packing.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from training import flex
from training.device import across
from training.packing import Block, Group, Packed

HIDDEN = float("-inf")

# What each query may see.
Seen = BlockMask | list[Group]
Impl = Literal["flex", "groups"]


def seen_by(
    packed: Packed, queries_Q: Tensor | None, device: torch.device, impl: Impl | None = None
) -> Seen:
    """What the tokens at `queries_Q` (ascending) may see, or all tokens; the same for each layer.

    `impl` is by default what suits the device.
    """
    if impl == "flex" or (impl is None and device.type == "cuda"):
        return flex.seen_by(packed, queries_Q, device)
    return across(packed.groups(queries_Q), device)


def attention(q_AQD: Tensor, k_aND: Tensor, v_aND: Tensor, seen: Seen, scale: float) -> Tensor:
    """softmax(scale * q k) v over what each query may see, [Q, A, D].

    The scores against a prompt are computed once for all its responses, without a copy of its keys.
    """
    if isinstance(seen, BlockMask):
        return flex.attention(q_AQD, k_aND, v_aND, seen, scale)
    q_AQD, k_aND = (q_AQD * scale).to(v_aND.dtype), k_aND.to(v_aND.dtype)
    heads_first = (x.contiguous() for x in (q_AQD, k_aND, v_aND))
    out: Tensor = _Attention.apply(*heads_first, seen)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Gradients by hand, so that what is padded is written once and nothing is masked twice."""

    @staticmethod
    def forward(
        ctx: Any, q_AQD: Tensor, k_aND: Tensor, v_aND: Tensor, groups: list[Group]
    ) -> Tensor:
        out_AQD = torch.empty_like(q_AQD)
        kept: list[Tensor] = []
        for group in groups:
            pk, pv = _keys(k_aND, group.prompt), _keys(v_aND, group.prompt)
            if len(group.prompt.write):
                pq = _queries(q_AQD, group.prompt, len(k_aND))
                kept.append(_softmax(_hide(torch.bmm(pq, pk.mT), group.prompt.hidden)))
                _put_queries(out_AQD, torch.bmm(kept[-1], pv), group.prompt)
            if group.response is None:
                continue
            rk, rv = _keys(k_aND, group.response), _keys(v_aND, group.response)
            rq = _queries(q_AQD, group.response, len(k_aND))
            kept.append(_response_weights(rq, pk, rk, group))
            seen, own = kept[-1].split([pk.shape[1], rk.shape[1]], -1)
            out = torch.bmm(own, rv)
            _wide(out, pv).baddbmm_(_wide(seen, pv), pv)
            _put_queries(out_AQD, out, group.response)
        ctx.save_for_backward(q_AQD, k_aND, v_aND, *kept)
        ctx.groups = groups
        return out_AQD.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_AQD, k_aND, v_aND, *kept = ctx.saved_tensors
        out_AQD = grads[0].transpose(0, 1).contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q_AQD, k_aND, v_aND))
        weights = iter(kept)
        for group in ctx.groups:
            pk, pv = _keys(k_aND, group.prompt), _keys(v_aND, group.prompt)
            dpk, dpv = torch.zeros_like(pk), torch.zeros_like(pv)
            if len(group.prompt.write):
                pq = _queries(q_AQD, group.prompt, len(k_aND))
                do, w = _outputs(out_AQD, group.prompt, len(k_aND)), next(weights)
                ds = _softmax_backward(torch.bmm(do, pv.mT), w)
                dpv.baddbmm_(w.mT, do)
                dpk.baddbmm_(ds.mT, pq)
                _put_queries(dq, torch.bmm(ds, pk), group.prompt)
            if group.response is not None:
                rk, rv = _keys(k_aND, group.response), _keys(v_aND, group.response)
                rq = _queries(q_AQD, group.response, len(k_aND))
                do, w = _outputs(out_AQD, group.response, len(k_aND)), next(weights)
                dseen = torch.bmm(_wide(do, pv), pv.mT).view(*do.shape[:2], -1)
                ds = _softmax_backward(torch.cat([dseen, torch.bmm(do, rv.mT)], -1), w)
                seen, own = w.split([pk.shape[1], rk.shape[1]], -1)
                dseen, down = ds.split([pk.shape[1], rk.shape[1]], -1)
                seen, dseen = _wide(seen, pv), _wide(dseen, pk)
                dpv.baddbmm_(seen.mT, _wide(do, pv))
                dpk.baddbmm_(dseen.mT, _wide(rq, pk))
                _put_keys(dv, torch.bmm(own.mT, do), group.response)
                _put_keys(dk, torch.bmm(down.mT, rq), group.response)
                drq = torch.bmm(down, rk)
                _wide(drq, pk).baddbmm_(dseen, pk)
                _put_queries(dq, drq, group.response)
            _put_keys(dk, dpk, group.prompt)
            _put_keys(dv, dpv, group.prompt)
        return dq, dk, dv, None


def _response_weights(rq: Tensor, pk: Tensor, rk: Tensor, group: Group) -> Tensor:
    """One softmax over prompt and own keys: [a * G * K, A / a * Rq, P + R]."""
    seen = torch.bmm(_wide(rq, pk), pk.mT)
    if group.prompt_padding is not None:
        _hide(seen, group.prompt_padding)
    assert group.response is not None
    own = _hide(torch.bmm(rq, rk.mT), group.response.hidden)
    return _softmax(torch.cat([seen.view(*rq.shape[:2], -1), own], -1))


def _wide(x: Tensor, prompt: Tensor) -> Tensor:
    """[a * G, K * rows, ...]: what belongs to the responses of one prompt, below one another."""
    return x.reshape(len(prompt), -1, x.shape[-1])


def _keys(x_aND: Tensor, block: Block) -> Tensor:
    """[a * G, T, D]: keys or values of the sequences of a block, padded."""
    heads, _, width = x_aND.shape
    return x_aND.index_select(1, block.keys).view(heads * block.count, -1, width)


def _put_keys(x_aND: Tensor, padded: Tensor, block: Block) -> None:
    """The real rows of `padded`, written where `_keys` had read them."""
    heads, _, width = x_aND.shape
    real = padded.view(heads, -1, width).index_select(1, block.key_slots)
    x_aND.index_copy_(1, block.keys[block.key_slots], real)


def _queries(q_AQD: Tensor, block: Block, key_heads: int) -> Tensor:
    """[a * G, A / a * Tq, D]: query heads that share a key head stand below one another."""
    q = q_AQD.index_select(1, block.queries)
    q = q.view(key_heads, len(q_AQD) // key_heads, block.count, -1, q.shape[-1]).transpose(1, 2)
    return q.reshape(key_heads * block.count, -1, q.shape[-1])


def _outputs(grad_AQD: Tensor, block: Block, key_heads: int) -> Tensor:
    """As `_queries`, but nothing flows from a padded query."""
    padded = grad_AQD.new_zeros(len(grad_AQD), len(block.queries), grad_AQD.shape[-1])
    padded.index_copy_(1, block.read, grad_AQD.index_select(1, block.write))
    shape = key_heads, len(grad_AQD) // key_heads, block.count, -1, grad_AQD.shape[-1]
    return padded.view(shape).transpose(1, 2).reshape(key_heads * block.count, -1, shape[-1])


def _put_queries(x_AQD: Tensor, padded: Tensor, block: Block) -> None:
    """The real rows of `padded`, written where `_queries` had read them."""
    heads, _, width = x_AQD.shape
    key_heads = len(padded) // block.count
    padded = padded.view(key_heads, block.count, heads // key_heads, -1, width).transpose(1, 2)
    real = padded.reshape(heads, -1, width).index_select(1, block.read)
    x_AQD.index_copy_(1, block.write, real)


def _hide(scores: Tensor, hidden: Tensor) -> Tensor:
    """Minus infinity, in place, where `hidden` [G or 1, Tq or 1, T] says so."""
    rows, columns = hidden.shape[1:]
    heads = 1 if rows == 1 else scores.shape[1] // rows
    shaped = scores.view(-1, len(hidden), heads, scores.shape[1] // heads, columns)
    shaped.masked_fill_(hidden[:, None], HIDDEN)
    return scores


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    inner: Tensor = torch._softmax_backward_data(grad, weights, -1, weights.dtype)  # noqa: SLF001
    return inner
