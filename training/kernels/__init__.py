"""The hot arithmetic of training, each operation with one `impl=`: "eager" or "triton".

Without `impl`, Triton runs on a GPU and the eager twin (reference.py) everywhere else. Shapes: B
sequences of R response tokens, right-padded; K ranked responses of one prompt; C tokens of a chunk,
V vocabulary. A mask is True at real tokens.
"""

from typing import Literal

from torch import Tensor

from training.kernels import reference
from training.kernels.reference import clipped, entropies, masked_mean, strict_pairs

Impl = Literal["eager", "triton"]

__all__ = [
    "Impl",
    "clipped",
    "entropies",
    "gae",
    "kl_rewards",
    "logits_gradient_",
    "masked_mean",
    "policy_losses",
    "ranking_loss",
    "statistics_",
    "strict_pairs",
    "value_losses",
    "whiten",
]


def _eager(impl: Impl | None, x: Tensor) -> bool:
    return not x.is_cuda if impl is None else impl == "eager"


def statistics_(
    logits_CV: Tensor, targets_C: Tensor, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, float32 [C], of the targets under float32 logits, and a normaliser [C].

    The logits may be overwritten: with the normaliser they are good for `logits_gradient_` alone.
    """
    if _eager(impl, logits_CV):
        return reference.statistics_(logits_CV, targets_C)
    from training.kernels import softmax

    return softmax.statistics_(logits_CV, targets_C)


def logits_gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    normaliser_C: Tensor,
    slopes_C: Tensor,
    impl: Impl | None = None,
) -> Tensor:
    """From d loss / d logprob to d loss / d logits = slope * (onehot - softmax), in place."""
    if _eager(impl, logits_CV):
        return reference.logits_gradient_(logits_CV, targets_C, normaliser_C, slopes_C)
    from training.kernels import softmax

    return softmax.logits_gradient_(logits_CV, targets_C, normaliser_C, slopes_C)


def gae(
    rewards_BR: Tensor, values_BR: Tensor, gamma: float, lam: float, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): advantages and returns, float32 [B, R].

    Rewards and values must be 0 beyond the end of a response, where the results are 0 then. An
    episode ends with its response: the value after the last token is 0.
    """
    if _eager(impl, rewards_BR):
        return reference.gae(rewards_BR, values_BR, gamma, lam)
    from training.kernels import scan

    return scan.gae(rewards_BR, values_BR, gamma, lam)


def whiten(
    values_BR: Tensor, mask_BR: Tensor, shift_mean: bool = True, impl: Impl | None = None
) -> Tensor:
    """Unit variance over the real tokens (biased estimate); the mean goes to 0, or stays with
    `shift_mean=False`.
    """
    if _eager(impl, values_BR):
        return reference.whiten(values_BR, mask_BR, shift_mean)
    from training.kernels import whitening

    return whitening.whiten(values_BR, mask_BR, shift_mean)


def kl_rewards(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    mask_BR: Tensor,
    beta: float,
    impl: Impl | None = None,
) -> Tensor:
    """reward[t] = -beta * (logp - ref_logp), and the score added at each response's last token
    (recipe, detail 12).
    """
    if _eager(impl, logprobs_BR):
        return reference.kl_rewards(scores_B, logprobs_BR, ref_logprobs_BR, mask_BR, beta)
    from training.kernels import kl_reward

    return kl_reward.kl_rewards(scores_B, logprobs_BR, ref_logprobs_BR, mask_BR, beta)


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float, impl: Impl | None = None
) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) of every token, any shape."""
    if _eager(impl, logprobs):
        return reference.policy_losses(logprobs, old, advantages, clip)
    from training.kernels import clipping

    return clipping.policy_losses(logprobs, old, advantages, clip)


def value_losses(
    values: Tensor, old: Tensor, returns: Tensor, clip: float, impl: Impl | None = None
) -> Tensor:
    """0.5 * max(squared error, squared error of the value clipped around the old), of every token,
    any shape.
    """
    if _eager(impl, values):
        return reference.value_losses(values, old, returns, clip)
    from training.kernels import clipping

    return clipping.value_losses(values, old, returns, clip)


def ranking_loss(
    scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor, impl: Impl | None = None
) -> Tensor:
    """InstructGPT's equation 1: the mean of -log sigmoid(r_w - r_l) over the pairs of a prompt,
    then over prompts.

    All pairs of a prompt are one batch element, so that a prompt with K = 9 weighs as much as one
    with K = 4. Tied pairs are dropped; the mean is over the pairs that remain, and a prompt without
    any is left out.
    """
    if _eager(impl, scores_BK):
        loss: Tensor = reference.RankingLoss.apply(scores_BK, ranks_BK, mask_BK)  # type: ignore[no-untyped-call]
        return loss
    from training.kernels import ranking

    return ranking.ranking_loss(scores_BK, ranks_BK, mask_BK)
