"""Attention over packed trees: every token sees its own sequence, and a response its prompt too.

Shapes: A query heads, a key heads (A is a multiple of a), D width of a head, N tokens, Q queries;
G, K, P, R and T as in training.packing.
"""

import torch
from torch import Tensor

from training.packing import Block, Group

HIDDEN = float("-inf")


def attention(
    q_AQD: Tensor, k_aND: Tensor, v_aND: Tensor, groups: list[Group], scale: float
) -> Tensor:
    """softmax(scale * q k) v over what each query may see, [Q, A, D]; `groups` from Packed.groups.

    The scores against a prompt are computed once for all its responses, without a copy of its keys.
    """
    q_AQD, k_aND = (q_AQD * scale).to(v_aND.dtype), k_aND.to(v_aND.dtype)
    outs, places = [], []
    for group in groups:
        pk, pv = (_keys(x, group.prompt, group.trees) for x in (k_aND, v_aND))
        if len(group.prompt.write):
            pq = _queries(q_AQD, group.prompt, group.trees, len(k_aND))
            weights = _softmax(_hide(torch.bmm(pq, pk.mT), group.prompt.hidden))
            outs.append(_real(torch.bmm(weights, pv), group.prompt, group.trees, len(q_AQD)))
            places.append(group.prompt.write)
        if group.response is not None:
            rq = _queries(q_AQD, group.response, group.trees * group.responses, len(k_aND))
            rk, rv = (
                _keys(x, group.response, group.trees * group.responses) for x in (k_aND, v_aND)
            )
            out = _responses(rq, (pk, pv), (rk, rv), group)
            outs.append(_real(out, group.response, group.trees * group.responses, len(q_AQD)))
            places.append(group.response.write)
    place = torch.cat(places)
    return torch.cat(outs).index_select(0, place.argsort())


def _responses(
    rq: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], group: Group
) -> Tensor:
    """One softmax over prompt and own keys: scores of both kinds side by side."""
    (pk, pv), (rk, rv) = prompt, own
    wide = rq.reshape(len(pk), -1, rq.shape[-1])
    seen = torch.bmm(wide, pk.mT)
    if group.prompt_padding is not None:
        _hide(seen, group.prompt_padding)
    assert group.response is not None
    mine = _hide(torch.bmm(rq, rk.mT), group.response.hidden)
    weights = _softmax(torch.cat([seen.view(*rq.shape[:2], -1), mine], -1))
    seen, mine = weights.split([pk.shape[1], rk.shape[1]], -1)
    out = torch.bmm(seen.reshape(len(pk), -1, pk.shape[1]), pv)
    return out.reshape(rq.shape) + torch.bmm(mine, rv)


def _keys(x_aND: Tensor, block: Block, count: int) -> Tensor:
    """[a * count, T, D]: keys or values of `count` sequences."""
    heads, _, width = x_aND.shape
    return x_aND.index_select(1, block.keys).view(heads * count, -1, width)


def _queries(q_AQD: Tensor, block: Block, count: int, key_heads: int) -> Tensor:
    """[a * count, A / a * Tq, D]: query heads that share a key head stand below one another."""
    q = q_AQD.index_select(1, block.queries)
    q = q.view(key_heads, len(q_AQD) // key_heads, count, -1, q.shape[-1]).transpose(1, 2)
    return q.reshape(key_heads * count, -1, q.shape[-1])


def _real(out: Tensor, block: Block, count: int, heads: int) -> Tensor:
    """[queries, A, D]: the real ones of `_queries`."""
    width = out.shape[-1]
    key_heads = len(out) // count
    out = out.view(key_heads, count, heads // key_heads, -1, width).permute(1, 3, 0, 2, 4)
    return out.reshape(-1, heads, width).index_select(0, block.read)


def _hide(scores: Tensor, hidden: Tensor) -> Tensor:
    """Minus infinity, in place, where `hidden` [G or 1, Tq or 1, T] says so."""
    rows, columns = hidden.shape[1:]
    heads = 1 if rows == 1 else scores.shape[1] // rows
    shaped = scores.view(-1, len(hidden), heads, scores.shape[1] // heads, columns)
    shaped.masked_fill_(hidden[:, None], HIDDEN)
    return scores


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
