"""What PPO learns from: a rollout, scored, with the KL charged and every token's advantage.

Shapes: B episodes, R response tokens (right-padded), M those of a pass; K responses to each prompt.
A mask is True at what is real.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training import ranks
from training.config import PpoConfig
from training.device import across
from training.kernels import gae, kl_rewards, masked_mean, whiten
from training.model import pack_pairs, packed_logprobs, trees_of
from training.networks import Networks
from training.objectives import (
    explained_variance,
    group_normalised,
    importance_weights,
    leave_one_out,
)
from training.optimizer import autocast
from training.packing import PASS_TOKENS
from training.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A rollout and what was computed of it once, before any update. All [B, R] but scores_B;
    `entropy` of the policy in nats a token. Without a value network, `old_values_BR` is what the
    other responses to a prompt say of one, and `returns_BR` its whole reward.
    """

    rollout: Rollout
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    old_values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    scores_B: Tensor
    entropy: float

    @property
    def kl(self) -> float:
        """Mean over responses of the summed log-ratio to the reference, in nats."""
        return float((self.old_logprobs_BR - self.ref_logprobs_BR).sum(1).mean())


@torch.no_grad()
def evaluate_rollout(
    config: PpoConfig, nets: Networks, rollout: Rollout, beta: float
) -> Experience:
    """Scores, log-probs, values, advantages and returns of a rollout, before any update."""
    engine_BR, device = rollout.engine_logprobs_BR, rollout.mask_BR.device
    logprobs_BR, ref_BR, values_BR = (torch.zeros_like(engine_BR) for _ in range(3))
    scores_B, entropies = engine_BR.new_zeros(len(rollout)), []
    finished = rollout.finished_B.tolist()
    for part, counts in without_padding(rollout, range(len(rollout))):
        pairs = [rollout.pairs[i] for i in part]
        packed, at_M, targets_M = pack_pairs(pairs, rollout.samples)
        places, at_B = rollout.places(part), across(torch.tensor(part), device)
        with autocast(config.precision, device):
            logprobs_M, entropies_M = packed_logprobs(nets.policy, packed, at_M, targets_M)
            logprobs_BR[places] = logprobs_M * counts
            entropies.append(entropies_M * counts)
            ref_M, _ = packed_logprobs(nets.reference, packed, at_M, targets_M)
            ref_BR[places] = ref_M * counts
            if nets.value is not None:
                values_BR[places] = nets.value.scores(packed, at_M) * counts
            if nets.translation is not None:
                packed = nets.translation.packed(pairs, [finished[i] for i in part])
            scores_B[at_B] = nets.reward.scores(packed, packed.ends) * counts
    entropy = torch.cat(entropies).sum()
    for x in (logprobs_BR, ref_BR, values_BR, scores_B, entropy):
        ranks.total(x)
    scores_B = torch.where(rollout.finished_B, scores_B, config.unfinished_reward)
    rewards_BR = kl_rewards(scores_B, logprobs_BR, ref_BR, rollout.mask_BR, beta)
    if config.advantage == "gae":
        estimated = by_value(config, rewards_BR, values_BR, rollout.mask_BR)
    else:
        estimated = by_others(config, rewards_BR, rollout.mask_BR)
    advantages_BR, values_BR, returns_BR = estimated
    if config.importance_cap:
        # The surrogate is linear in an advantage, so that the weight of a token can stand with it.
        weights_BR = importance_weights(logprobs_BR, engine_BR, config.importance_cap)
        advantages_BR = advantages_BR * weights_BR
    return Experience(
        rollout=rollout,
        old_logprobs_BR=logprobs_BR,
        ref_logprobs_BR=ref_BR,
        old_values_BR=values_BR,
        advantages_BR=advantages_BR,
        returns_BR=returns_BR,
        scores_B=scores_B,
        entropy=(entropy / rollout.mask_BR.sum()).item(),
    )


def by_value(
    config: PpoConfig, rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, the values themselves and returns, from a value network's predictions."""
    if config.whiten_rewards:
        rewards_BR = whiten(rewards_BR, mask_BR, shift_mean=False)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, config.gamma, config.lam)
    return whiten(advantages_BR, mask_BR), values_BR, returns_BR


def by_others(
    config: PpoConfig, rewards_BR: Tensor, mask_BR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, baselines and whole rewards, the same at every token of a response, from the
    rewards of all responses to its prompt.
    """
    returns_BK = rewards_BR.sum(1).view(-1, config.samples_per_prompt)
    if config.whiten_rewards:
        returns_BK = whiten(returns_BK, torch.ones_like(returns_BK), shift_mean=False)
    others_BK = leave_one_out(returns_BK)
    rloo = config.advantage == "rloo"
    advantages_BK = returns_BK - others_BK if rloo else group_normalised(returns_BK)
    spread = (x_BK.view(-1, 1) * mask_BR for x_BK in (advantages_BK, others_BK, returns_BK))
    advantages_BR, values_BR, returns_BR = spread
    return advantages_BR, values_BR, returns_BR


def without_padding(rollout: Rollout, indices: Sequence[int]) -> Iterator[tuple[list[int], float]]:
    """The episodes at `indices` in this rank's passes, of similar lengths, and what these count;
    all responses to a prompt in the same one.
    """
    trees = trees_of([rollout.pairs[i] for i in indices], rollout.samples)
    for part, counts in ranks.passes(trees, PASS_TOKENS):
        groups = (range(tree * rollout.samples, (tree + 1) * rollout.samples) for tree in part)
        yield [indices[i] for group in groups for i in group], counts


def figures(experience: Experience) -> dict[str, float]:
    """What reward and loss curves alone do not show (recipe, detail 20)."""
    rollout, mask_BR = experience.rollout, experience.rollout.mask_BR
    mismatch_BR = (experience.old_logprobs_BR - rollout.engine_logprobs_BR).abs()
    return {
        "reward": experience.scores_B.mean().item(),
        "reward_p10": experience.scores_B.quantile(0.1).item(),
        "reward_p90": experience.scores_B.quantile(0.9).item(),
        "kl": experience.kl,
        "length": mask_BR.sum(1).float().mean().item(),
        "eos_rate": rollout.finished_B.float().mean().item(),
        "entropy": experience.entropy,
        "explained_variance": explained_variance(
            experience.old_values_BR, experience.returns_BR, mask_BR
        ),
        "logprob_mismatch": masked_mean(mismatch_BR, mask_BR).item(),
        "logprob_mismatch_max": mismatch_BR[mask_BR].max().item(),
    }
