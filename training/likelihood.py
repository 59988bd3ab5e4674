"""The gradient of the mean log-likelihood of responses: SFT's loss, and the pretraining mix."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training import ranks
from training.device import Precision, across, device_of
from training.model import Pair, pack_pairs, packed_loss
from training.optimizer import autocast
from training.packing import PASS_TOKENS, Tree


def accumulate_likelihood(
    model: PreTrainedModel, pairs: Sequence[Pair], precision: Precision, weight: float = 1.0
) -> Tensor:
    """The gradient of `weight` times the mean negative log-likelihood per response token,
    end-of-text included, in passes without padding; this rank's share of the mean itself, a number
    on the device.
    """
    return accumulate_mixed_likelihood(model, [(pairs, weight)], precision)[0]


def accumulate_mixed_likelihood(
    model: PreTrainedModel, sets: Sequence[tuple[Sequence[Pair], float]], precision: Precision
) -> Tensor:
    """As above for several sets of pairs, each with its weight: they share passes, and each has a
    mean of its own, [S]. A pass costs a small model about as much for few tokens as for many.
    """
    device = device_of(model)
    pairs = [pair for own, _ in sets for pair in own]
    set_P = torch.tensor([s for s, (own, _) in enumerate(sets) for _ in own])
    length_P = torch.tensor([len(response) for _, response in pairs])
    count_S = torch.zeros(len(sets)).index_add_(0, set_P, length_P.float())
    slope_S = torch.tensor([weight for _, weight in sets]) / count_S
    total_S = torch.zeros(len(sets), device=device)
    trees = [Tree([*prompt, *response]) for prompt, response in pairs]
    for part, counts in ranks.passes(trees, PASS_TOKENS):
        set_M = set_P[part].repeat_interleave(length_P[part])
        set_M, slope_M = across((set_M, slope_S[set_M] * counts), device)
        with autocast(precision, device):
            inputs = pack_pairs([pairs[i] for i in part])
            loss, logprobs_M = packed_loss(model, *inputs, partial(_weighted, slope_M))
        loss.backward()
        total_S.index_add_(0, set_M, -logprobs_M, alpha=counts)
    return total_S / across(count_S, device)


def _weighted(slope_M: Tensor, logprobs_C: Tensor, at: slice) -> Tensor:
    return -logprobs_C * slope_M[at]
