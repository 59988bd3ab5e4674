"""What PPO steers by: the weight of the KL penalty and of a token that an engine drew, and how well
the value network predicts.

Shapes: B sequences, R response tokens (right-padded). A mask is True at real tokens.
"""

from typing import Any

import torch
from torch import Tensor

from training.config import KL_ERROR, PpoConfig


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


def explained_variance(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the real tokens; 1 is perfect, 0 no better than
    a constant.
    """
    returns, errors = returns_BR[mask_BR], (returns_BR - values_BR)[mask_BR]
    return float(1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8))
