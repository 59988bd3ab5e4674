"""Prompts > policy: PPO with the pretraining mix (InstructGPT, 3.5 and C.4).

One iteration: sample responses with vLLM, score them, charge the KL to the SFT policy, estimate
advantages, then a few minibatch steps in which the PPO and the pretraining gradients meet in the
same buffers before one optimizer step.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from contracts.errors import InvalidInput
from training import lora, ranks
from training.backbone import recompute_layers
from training.checkpoint import Checkpoint, Stateful
from training.config import PpoConfig
from training.data import Order, PromptRow, TokenStream, fits, render, shuffled_batches
from training.kernels import (
    clipped,
    gae,
    kl_rewards,
    masked_mean,
    policy_losses,
    value_losses,
    whiten,
)
from training.likelihood import accumulate_likelihood
from training.metrics import Metrics, mean_of, sum_of
from training.model import (
    backbone_of,
    load_tokenizer,
    pack_pairs,
    packed_logprobs,
    packed_loss,
    save_policy,
    whole_weights,
)
from training.networks import Networks, load_networks
from training.objectives import KlController, explained_variance, importance_weights
from training.optimizer import adam, autocast, average_weights, set_rate, step, warmup_share
from training.packing import PASS_TOKENS, Tree
from training.rollout import Rollout, Sampler, pack

# How far the seeds of ranks are apart: more than a run has iterations.
APART = 1_000_000_007


@dataclass(frozen=True)
class Experience:
    """A rollout and what was computed of it once, before any update. All [B, R] but scores_B;
    `entropy` of the policy in nats a token.
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


def train_ppo(
    config: PpoConfig,
    sft: Path,
    reward_model: Path,
    prompts: Sequence[PromptRow],
    pretraining: Sequence[str],
    sampler: Sampler,
    folder: Path,
    metrics: Metrics,
) -> None:
    """Train from the policy in `sft` against `reward_model`; save the averaged weights into the new
    folder `folder`.

    `pretraining` are the documents of the ptx mix. Stops early when the KL budget is spent. Goes on
    from its checkpoint where there is one.
    """
    # 1. Models, prompts, optimizers.
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(sft)
    nets = load_networks(sft, reward_model, prompts, config.lora, config.seed)
    average = lora.twin(nets.policy)
    recompute_layers(backbone_of(nets.policy), config.recompute)
    recompute_layers(nets.value.backbone, config.recompute)
    for network in (nets.policy, nets.reference, nets.value, nets.reward, average):
        ranks.shard(network)
    prompt_ids = usable_prompts(config, tokenizer, prompts)
    documents = tokenizer(list(pretraining), add_special_tokens=False)["input_ids"]
    stream = TokenStream(documents, tokenizer.eos_token_id, config.ptx_row_tokens, config.seed)
    policy_optimizer = adam(nets.policy.parameters(), config.policy_rate, config.adam_eps)
    value_optimizer = adam(nets.value.parameters(), config.value_rate, config.adam_eps)
    controller, order = KlController(config), Order(len(prompt_ids), config.seed)
    parts: dict[str, Stateful] = {
        "policy": nets.policy,
        "policy_optimizer": policy_optimizer,
        "value": nets.value,
        "value_optimizer": value_optimizer,
        "average": average,
        "controller": controller,
        "prompts": order,
        "text": stream.order,
        "metrics": metrics,
    }
    iterations = max(1, config.episodes // config.batch)
    progress = Checkpoint(folder, config, (prompt_ids, documents), parts)

    for iteration in range(progress.restore(), iterations):
        # 2. Sample on the weights of this iteration: every rank its part, on an engine of its own.
        seed = config.seed * 1_000_003 + iteration
        batch = [prompt_ids[i] for i in order.take(config.batch)]
        sampler.load(whole_weights(nets.policy))
        own, own_seed = ranks.part(batch), seed + APART * ranks.rank()
        samples = ranks.everyone(sampler.sample(own, config.max_response_tokens, own_seed))
        rollout = pack(batch, [drawn[0] for part in samples for drawn in part])

        # 3. Score, KL reward, advantages: once per rollout.
        experience = evaluate_rollout(config, nets, rollout, controller.beta)
        if experience.kl > config.kl_budget:
            metrics.write(iteration, kl=experience.kl, reward=experience.scores_B.mean().item())
            break

        # 4. Minibatch steps.
        share = warmup_share(iteration, config.warmup_iterations)
        learning = iteration >= config.value_warmup_iterations
        set_rate(policy_optimizer, config.policy_rate * share * learning)
        set_rate(value_optimizer, config.value_rate * share)
        steps, rng = [], random.Random(seed)
        for _ in range(config.inner_epochs):
            for indices in shuffled_batches(len(rollout), config.minibatch, rng):
                rows_PT = stream.take(len(indices) * config.ptx_examples_per_episode)
                steps.append(update(config, nets, experience, indices, rows_PT))
                step(nets.policy, policy_optimizer, config.max_grad_norm)
                step(nets.value, value_optimizer, config.max_grad_norm)

        # 5. Average the weights, write what happened, move beta.
        average_weights(average, nets.policy, config.ema)
        means = sum_of(ranks.everyone(mean_of(steps)))
        metrics.write(iteration, **figures(experience), **means, beta=controller.beta)
        controller.update(experience.kl, len(rollout))
        progress.save(iteration + 1)

    save_policy(average, tokenizer, folder)


def usable_prompts(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptRow]
) -> list[list[int]]:
    ids = [render(tokenizer, row) for row in prompts]
    kept = [p for p in ids if fits(p, [], config.max_prompt_tokens, 0)]
    if not kept:
        raise InvalidInput(
            "PPO prompts",
            f"at least one of 1 to {config.max_prompt_tokens} tokens",
            f"{len(ids)} rows",
        )
    return kept


@torch.no_grad()
def evaluate_rollout(
    config: PpoConfig, nets: Networks, rollout: Rollout, beta: float
) -> Experience:
    """Scores, log-probs, values, advantages and returns of a rollout, before any update."""
    shape = rollout.mask_BR.shape
    logprobs_BR, ref_BR, values_BR = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    scores_B, entropies = torch.zeros(len(rollout)), []
    for part, counts in without_padding(rollout, range(len(rollout))):
        pairs = [rollout.pairs[i] for i in part]
        packed, at_M, targets_M = pack_pairs(pairs)
        rows_M, columns_M = rollout.mask_BR[part].nonzero(as_tuple=True)
        places = torch.tensor(part)[rows_M], columns_M
        with autocast(config.precision):
            logprobs_M, entropies_M = packed_logprobs(nets.policy, packed, at_M, targets_M)
            logprobs_BR[places] = logprobs_M * counts
            entropies.append(entropies_M * counts)
            ref_M, _ = packed_logprobs(nets.reference, packed, at_M, targets_M)
            ref_BR[places] = ref_M * counts
            values_BR[places] = nets.value.scores(packed, at_M) * counts
            if nets.translation is not None:
                packed = nets.translation.packed(pairs, rollout.finished_B[part].tolist())
            scores_B[part] = nets.reward.scores(packed, packed.ends) * counts
    entropy = torch.cat(entropies).sum()
    for x in (logprobs_BR, ref_BR, values_BR, scores_B, entropy):
        ranks.total(x)
    scores_B = torch.where(rollout.finished_B, scores_B, config.unfinished_reward)
    rewards_BR = kl_rewards(scores_B, logprobs_BR, ref_BR, rollout.mask_BR, beta)
    if config.whiten_rewards:
        rewards_BR = whiten(rewards_BR, rollout.mask_BR, shift_mean=False)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, config.gamma, config.lam)
    advantages_BR = whiten(advantages_BR, rollout.mask_BR)
    if config.importance_cap:
        # The surrogate is linear in an advantage, so that the weight of a token can stand with it.
        engine_BR, cap = rollout.engine_logprobs_BR, config.importance_cap
        advantages_BR = advantages_BR * importance_weights(logprobs_BR, engine_BR, cap)
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


def without_padding(rollout: Rollout, indices: Sequence[int]) -> Iterator[tuple[list[int], float]]:
    """The episodes at `indices` in this rank's passes, of similar lengths, and what these count."""
    trees = [Tree([*prompt, *response]) for prompt, response in (rollout.pairs[i] for i in indices)]
    for part, counts in ranks.passes(trees, PASS_TOKENS):
        yield [indices[i] for i in part], counts


def update(
    config: PpoConfig, nets: Networks, experience: Experience, indices: list[int], rows_PT: Tensor
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch: clipped policy loss, pretraining loss, clipped
    value loss. Each is a mean over all tokens of the minibatch, in however many passes, and each
    rank has a share of it.
    """
    rollout, tokens = experience.rollout, int(experience.rollout.mask_BR[indices].sum())
    passed = []
    for part, counts in without_padding(rollout, indices):
        mask_BR = rollout.mask_BR[part]
        old_M, advantages_M, old_values_M, returns_M = (
            x_BR[part][mask_BR]
            for x_BR in (
                experience.old_logprobs_BR,
                experience.advantages_BR,
                experience.old_values_BR,
                experience.returns_BR,
            )
        )
        advantages_M = advantages_M * counts
        surrogates = partial(surrogate_of, old_M, advantages_M, config.clip, tokens)
        packed, at_M, targets_M = pack_pairs([rollout.pairs[i] for i in part])
        with autocast(config.precision):
            surrogate, logprobs_M = packed_loss(nets.policy, packed, at_M, targets_M, surrogates)
        surrogate.backward()
        with autocast(config.precision):
            values_M = nets.value.scores(packed, at_M)
        errors_M = value_losses(values_M, old_values_M, returns_M, config.value_clip)
        value_error = errors_M.sum() * counts / tokens
        value_error.backward()
        ratio_M = torch.exp(logprobs_M - old_M)
        clips_M = clipped(ratio_M, advantages_M, config.clip)
        passed.append((surrogate.detach(), value_error.detach(), ratio_M, clips_M))
    ptx = 0.0
    if config.ptx_coefficient and len(rows_PT):
        texts = [(row[:1], row[1:]) for row in rows_PT.tolist()]
        ptx = accumulate_likelihood(nets.policy, texts, config.precision, config.ptx_coefficient)
    surrogates_, errors, ratios, clips = zip(*passed, strict=True)
    return {
        "policy_loss": sum(surrogates_).item(),
        "ptx_loss": ptx,
        "value_loss": sum(errors).item(),
        "clip_fraction": (torch.cat(clips).sum() / tokens).item(),
        "ratio_min": torch.cat(ratios).min().item(),
        "ratio_max": torch.cat(ratios).max().item(),
    }


def surrogate_of(
    old_M: Tensor, advantages_M: Tensor, clip: float, tokens: int, logprobs_C: Tensor, at: slice
) -> Tensor:
    """What the response tokens `at` add to the clipped surrogate, a mean over `tokens`."""
    return policy_losses(logprobs_C, old_M[at], advantages_M[at], clip) / tokens


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
