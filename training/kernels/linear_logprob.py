"""Token log-probabilities from hidden states and the unembedding; the logits are never stored.

Shapes: M tokens, H width of the model, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.kernels import Impl, entropies, logits_gradient_, statistics_

# Tokens whose logits exist at once.
CHUNK = 512

# From the log-probabilities of some tokens, float32 [C], and which of the M these are, to the share
# of each in the loss, [C]. What a token adds must depend on its own log-probability alone.
TokenLosses = Callable[[Tensor, slice], Tensor]


@torch.no_grad()
def linear_logprobs(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T + bias) at `targets_M`, and the entropy of each softmax in nats,
    both float32 [M], without gradients.
    """
    logprobs_M, entropies_M = hidden_MH.new_empty(2, len(targets_M), dtype=torch.float32)
    for at in _chunks(len(targets_M)):
        logits_CV = _logits(hidden_MH[at], weight_VH, bias_V)
        entropies_M[at] = entropies(logits_CV)
        logprobs_M[at], _ = statistics_(logits_CV, targets_M[at])
    return logprobs_M, entropies_M


def linear_logprob_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    losses: TokenLosses,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of `losses` over the tokens, and their log-probabilities [M] (without gradient).

    A loss that is a sum over tokens has its gradient at each chunk of logits as soon as these are
    known: it is formed in the forward pass, and nothing of size V outlives its chunk.
    """
    device = hidden_MH.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        hidden_MH, weight_VH = hidden_MH.to(narrow), weight_VH.to(narrow)
    loss, logprobs_M = _LogprobLoss.apply(  # type: ignore[no-untyped-call]
        hidden_MH, weight_VH, bias_V, targets_M, losses, impl
    )
    return loss, logprobs_M


class _LogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        losses: TokenLosses,
        impl: Impl | None,
    ) -> tuple[Tensor, Tensor]:
        # In float32, whatever the type of what comes in.
        whole = partial(hidden_MH.new_zeros, dtype=torch.float32)
        loss, logprobs_M = whole(()), whole(len(targets_M))
        # A frozen unembedding has no gradient, which would be as large as itself.
        _, trained, *_ = ctx.needs_input_grad
        dweight_VH = whole(weight_VH.shape if trained else 0)
        dbias_V = whole(len(weight_VH))
        dhidden_MH = torch.empty_like(hidden_MH)
        for at in _chunks(len(targets_M)):
            logits_CV, targets_C = _logits(hidden_MH[at], weight_VH, bias_V), targets_M[at]
            logprobs_M[at], normaliser_C = statistics_(logits_CV, targets_C, impl)
            share, slopes_C = _slopes(losses, logprobs_M[at], at)
            loss += share
            dlogits_CV = logits_gradient_(logits_CV, targets_C, normaliser_C, slopes_C, impl)
            if bias_V is not None:
                dbias_V += dlogits_CV.sum(0)
            dlogits_CV = dlogits_CV.to(weight_VH.dtype)
            torch.mm(dlogits_CV, weight_VH, out=dhidden_MH[at])
            if trained:
                _add_product(dweight_VH, dlogits_CV, hidden_MH[at])
        ctx.save_for_backward(dhidden_MH, dweight_VH.to(weight_VH.dtype), dbias_V)
        ctx.trained, ctx.biased = trained, bias_V is not None
        ctx.mark_non_differentiable(logprobs_M)
        return loss, logprobs_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Almost always 1, and then nothing has to be done; but to ask a GPU is to wait for it.
        found, slope = ctx.saved_tensors, grads[0]
        if slope.device.type != "cpu":
            found = [g.mul_(slope) for g in found]
        elif slope != 1:
            found = [g * slope for g in found]
        dhidden_MH, dweight_VH, dbias_V = found
        dweight = dweight_VH if ctx.trained else None
        return dhidden_MH, dweight, dbias_V if ctx.biased else None, None, None, None


def _chunks(count: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """[C, V] in float32: in a narrower type the log-sum-exp is off by 4e-3."""
    logits_CV = (hidden_CH @ weight_VH.T).float()
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


@torch.enable_grad()
def _slopes(losses: TokenLosses, logprobs_C: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and its derivative at every log-probability."""
    leaf_C = logprobs_C.detach().requires_grad_()
    loss = losses(leaf_C, at).sum()
    [slopes_C] = torch.autograd.grad(loss, leaf_C)
    return loss.detach(), slopes_C


def _add_product(total_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
    if hidden_CH.dtype == total_VH.dtype:
        total_VH.addmm_(dlogits_CV.T, hidden_CH)
    else:
        total_VH += dlogits_CV.T @ hidden_CH
