"""Report and thresholds > decision with reasons."""

from dataclasses import dataclass

from training.config import GateConfig
from training.evaluation.interval import Interval


@dataclass(frozen=True)
class Decision:
    """`reasons` is empty exactly when the policy passed."""

    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons


def decide(
    config: GateConfig, win_rate: Interval, people: int, kl: float, lm_loss_rise: float
) -> Decision:
    """Whether a policy may be released, and every reason why not.

    `kl` in nats per response against the parent, `lm_loss_rise` in nats per token. A figure that is
    not a number fails.
    """
    reasons = []
    if people < config.min_people:
        reasons.append(
            f"held-out people: expected prompts of at least {config.min_people}, got {people}"
        )
    if not kl <= config.max_kl:
        reasons.append(
            f"KL to the parent: expected at most {config.max_kl:g} nats a response, got {kl:.2f}"
        )
    if not win_rate.low > config.min_win_rate:
        reasons.append(
            f"win rate by {config.judge}: expected the 95 % interval above "
            f"{config.min_win_rate:g}, "
            f"got {win_rate.mean:.3f} [{win_rate.low:.3f}, {win_rate.high:.3f}]"
        )
    if not lm_loss_rise <= config.max_lm_loss_rise:
        reasons.append(
            f"held-out language modelling: expected a rise of at most "
            f"{config.max_lm_loss_rise:g} nats a token, got {lm_loss_rise:.3f}"
        )
    return Decision(tuple(reasons))
