"""Prompts > policy: PPO with the pretraining mix (InstructGPT, 3.5 and C.4).

One iteration: sample responses with vLLM, score them, charge the KL to the SFT policy, estimate
advantages, then a few minibatch steps in which the PPO and the pretraining gradients meet in the
same buffers before one optimizer step.
"""

import random
from collections.abc import Sequence
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
from training.data import PromptRow, TokenStream, fits, render, shuffled_batches
from training.episodes import Episodes, iteration_seed
from training.experience import Experience, evaluate_rollout, figures, without_padding
from training.kernels import clipped, policy_losses, value_losses
from training.likelihood import accumulate_likelihood
from training.metrics import Metrics, mean_of, sum_of
from training.model import (
    backbone_of,
    load_tokenizer,
    pack_pairs,
    packed_loss,
    save_policy,
    whole_weights,
)
from training.networks import Networks, load_networks
from training.objectives import KlController
from training.optimizer import adam, autocast, average_weights, set_rate, step, warmup_share
from training.rollout import Engine


def train_ppo(
    config: PpoConfig,
    sft: Path,
    reward_model: Path,
    prompts: Sequence[PromptRow],
    pretraining: Sequence[str],
    sampler: Engine,
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
    nets = load_networks(
        sft, reward_model, prompts, config.advantage, config.lora, config.seed, config.device
    )
    average = lora.twin(nets.policy)
    recompute_layers(backbone_of(nets.policy), config.recompute)
    if nets.value is not None:
        recompute_layers(nets.value.backbone, config.recompute)
    for network in (*nets.trained.values(), nets.reference, nets.reward, average):
        ranks.shard(network)
    prompt_ids = usable_prompts(config, tokenizer, prompts)
    documents = tokenizer(list(pretraining), add_special_tokens=False)["input_ids"]
    stream = TokenStream(documents, tokenizer.eos_token_id, config.ptx_row_tokens, config.seed)
    rates = {"policy": config.policy_rate, "value": config.value_rate}
    optimizers = {
        name: adam(network.parameters(), rates[name], config.adam_eps)
        for name, network in nets.trained.items()
    }
    controller = KlController(config)
    episodes = Episodes(config, sampler, partial(whole_weights, nets.policy), prompt_ids)
    parts: dict[str, Stateful] = {
        **nets.trained,
        **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()},
        "average": average,
        "controller": controller,
        "episodes": episodes,
        "text": stream.order,
        "metrics": metrics,
    }
    progress = Checkpoint(folder, config, (prompt_ids, documents), parts)

    for iteration in range(progress.restore(), config.iterations):
        # 2. Sample on the weights of this iteration, or take what was drawn ahead.
        rollout = episodes.take(iteration)
        with episodes.ahead(iteration + 1):
            # 3. Score, KL reward, advantages: once per rollout.
            experience = evaluate_rollout(config, nets, rollout, controller.beta)
            if experience.kl > config.kl_budget:
                metrics.write(iteration, kl=experience.kl, reward=experience.scores_B.mean().item())
                break

            # 4. Minibatch steps, each on all responses to its prompts.
            share = warmup_share(iteration, config.warmup_iterations)
            learning = iteration >= config.value_warmup_iterations
            shares = {"policy": share * learning, "value": share}
            for name, optimizer in optimizers.items():
                set_rate(optimizer, rates[name] * shares[name])
            steps, rng = [], random.Random(iteration_seed(config, iteration))
            for _ in range(config.inner_epochs):
                for indices in minibatches(config, len(rollout), rng):
                    rows_PT = stream.take(len(indices) * config.ptx_examples_per_episode)
                    steps.append(update(config, nets, experience, indices, rows_PT))
                    for name, optimizer in optimizers.items():
                        step(nets.trained[name], optimizer, config.max_grad_norm)

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


def minibatches(config: PpoConfig, episodes: int, rng: random.Random) -> list[list[int]]:
    """Indices of episodes in random order, the responses to a prompt together."""
    group = config.samples_per_prompt
    prompts = shuffled_batches(episodes // group, config.minibatch // group, rng)
    return [[i * group + k for i in batch for k in range(group)] for batch in prompts]


def update(
    config: PpoConfig, nets: Networks, experience: Experience, indices: list[int], rows_PT: Tensor
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch: clipped policy loss, pretraining loss, clipped
    value loss. Each is a mean over all tokens of the minibatch, in however many passes, and each
    rank has a share of it.
    """
    rollout, device = experience.rollout, experience.rollout.mask_BR.device
    tokens = sum(len(rollout.pairs[i][1]) for i in indices)
    passed = []
    for part, counts in without_padding(rollout, indices):
        places = rollout.places(part)
        old_M, advantages_M = (
            x_BR[places] for x_BR in (experience.old_logprobs_BR, experience.advantages_BR)
        )
        advantages_M = advantages_M * counts
        surrogates = partial(surrogate_of, old_M, advantages_M, config.clip, tokens)
        packed, at_M, targets_M = pack_pairs([rollout.pairs[i] for i in part], rollout.samples)
        with autocast(config.precision, device):
            surrogate, logprobs_M = packed_loss(nets.policy, packed, at_M, targets_M, surrogates)
        surrogate.backward()
        value_error = torch.zeros(())
        if nets.value is not None:
            with autocast(config.precision, device):
                values_M = nets.value.scores(packed, at_M)
            old_values_M, returns_M = (
                x_BR[places] for x_BR in (experience.old_values_BR, experience.returns_BR)
            )
            errors_M = value_losses(values_M, old_values_M, returns_M, config.value_clip)
            value_error = errors_M.sum() * counts / tokens
            value_error.backward()
        ratio_M = torch.exp(logprobs_M - old_M)
        clips_M = clipped(ratio_M, advantages_M, config.clip)
        passed.append((surrogate.detach(), value_error.detach(), ratio_M, clips_M))
    ptx = torch.zeros((), device=device)
    if config.ptx_coefficient and len(rows_PT):
        texts = [(row[:1], row[1:]) for row in rows_PT.tolist()]
        ptx = accumulate_likelihood(nets.policy, texts, config.precision, config.ptx_coefficient)
    surrogates_, errors, ratios, clips = zip(*passed, strict=True)
    told = {
        "policy_loss": sum(surrogates_),
        "ptx_loss": ptx,
        **({"value_loss": sum(errors)} if nets.value is not None else {}),
        "clip_fraction": torch.cat(clips).sum() / tokens,
        "ratio_min": torch.cat(ratios).min(),
        "ratio_max": torch.cat(ratios).max(),
    }
    # Read once, when all is on its way.
    return dict(zip(told, torch.stack([*told.values()]).tolist(), strict=True))


def surrogate_of(
    old_M: Tensor, advantages_M: Tensor, clip: float, tokens: int, logprobs_C: Tensor, at: slice
) -> Tensor:
    """What the response tokens `at` add to the clipped surrogate, a mean over `tokens`."""
    return policy_losses(logprobs_C, old_M[at], advantages_M[at], clip) / tokens
