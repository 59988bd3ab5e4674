"""What PPO steers by: the weight of the KL penalty and of a token that an engine drew, advantages
without a value network, and how well rewards are predicted. And another loss of a ranking.

Shapes: B sequences, R response tokens (right-padded); of groups: B prompts, K responses to each. A
mask is True at what is real.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import KL_ERROR, PpoConfig
from training.kernels import strict_pairs


class KlController:
    """The weight `beta` of the KL penalty: fixed, or moved after every batch so that the mean KL to
    the reference comes near a target, in nats per response (Ziegler et al., arXiv 1909.08593, 2.2).
    """

    def __init__(self, config: PpoConfig) -> None:
        self.beta = config.beta
        self._config = config

    def update(self, kl: float, episodes: int) -> None:
        """A batch of `episodes` had this mean KL. By target and horizon, with the error
        e = clip(kl / target - 1, -0.2, 0.2): beta <- beta * (1 + e * episodes / horizon).
        """
        if self._config.kl_controller == "adaptive":
            error = min(max(kl / self._config.kl_target - 1, -KL_ERROR), KL_ERROR)
            self.beta *= 1 + error * episodes / self._config.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]


def importance_weights(trainer_BR: Tensor, engine_BR: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_engine, cap) of every token, [B, R], from their log-probabilities.

    Truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17:295, 2008): what the engine's
    other kernels drew counts as if the trainer's model had drawn it, with a bounded variance.
    """
    return torch.exp(trainer_BR - engine_BR).clamp(max=cap)


def leave_one_out(rewards_BK: Tensor) -> Tensor:
    """RLOO's baseline (Ahmadian et al., arXiv 2402.14740, 3): of each response, the mean reward of
    the other K - 1 to its prompt, [B, K].
    """
    return (rewards_BK.sum(1, keepdim=True) - rewards_BK) / (rewards_BK.shape[1] - 1)


def group_normalised(rewards_BK: Tensor) -> Tensor:
    """GRPO's advantage (Shao et al., arXiv 2402.03300, 4.1.2): rewards less the mean of their
    prompt's, in its standard deviations (biased), [B, K]; 0 where all are equal.
    """
    apart_BK = rewards_BK - rewards_BK.mean(1, keepdim=True)
    return apart_BK * torch.rsqrt((apart_BK**2).mean(1, keepdim=True) + 1e-8)


def explained_variance(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the real tokens; 1 is perfect, 0 no better than
    a constant.
    """
    returns, errors = returns_BR[mask_BR], (returns_BR - values_BR)[mask_BR]
    return float(1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8))


def plackett_luce_loss(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """A ranking as choices, each of the best among what is left (Plackett, J. R. Stat. Soc. C
    24:193, 1975; Luce, 1959): the mean of -log(exp(r_i) / sum over j of exp(r_j)) over the choices
    of a prompt, then over prompts. Of two responses it is `ranking_loss`.

    A response is chosen among itself and those ranked strictly below it, so that tied ones do not
    compete (Breslow's approximation, Biometrics 30:89, 1974). Where nothing is below, nothing was
    chosen; a prompt without a choice is left out.
    """
    below_BKK = strict_pairs(ranks_BK, mask_BK)
    leads_BKK = scores_BK[:, None, :] - scores_BK[:, :, None]
    leads_BKK = leads_BKK.masked_fill(~below_BKK, -torch.inf)
    # The chosen response itself: exp(0).
    losses_BK = torch.logsumexp(F.pad(leads_BKK, (1, 0)), -1)
    choices_B = below_BKK.any(-1).sum(1)
    return (losses_BK.sum(1) / choices_B.clamp(min=1)).sum() / (choices_B > 0).sum().clamp(min=1)
