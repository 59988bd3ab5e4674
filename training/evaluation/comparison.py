"""Two policies answer the prompts of held-out people; judges say who wins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from contracts.errors import InvalidInput
from training.config import EvaluationConfig, PpoConfig
from training.data import PromptRow, encode_response, fits, render
from training.device import Device
from training.evaluation.interval import Interval, clustered_mean
from training.model import load_policy, load_tokenizer, response_logprobs
from training.reward_head import RewardModel
from training.reward_model import score_sequences
from training.rollout import Sampled, Sampler


@dataclass(frozen=True)
class Answers:
    """What one policy answered: for each prompt a few samples, as tokens and as text."""

    samples: list[list[Sampled]]
    texts: list[list[str]]


@dataclass(frozen=True)
class Comparison:
    """The same prompts answered by the parent (`before`) and by the new policy (`after`)."""

    rows: list[PromptRow]
    prompts: list[list[int]]
    before: Answers
    after: Answers


# From prompts, responses and whether each finished to one score a response; higher is better.
Judge = Callable[[Sequence[PromptRow], Sequence[str], Sequence[bool]], Sequence[float]]


def compare(
    config: EvaluationConfig,
    sampler: Sampler,
    before: Path,
    after: Path,
    rows: Sequence[PromptRow],
    lengths: PpoConfig,
) -> Comparison:
    """Sample both policies at temperature 1 on up to `max_prompts` of `rows`, evenly spread.

    Prompts longer than those of PPO are left out; answers are cut where PPO cuts them.
    """
    tokenizer = load_tokenizer(after)
    chosen, prompts = _fitting(config, tokenizer, rows, lengths)

    def answers(folder: Path, seed: int) -> Answers:
        return _answer(config, sampler, folder, prompts, tokenizer, lengths, seed)

    return Comparison(
        chosen, prompts, answers(before, config.seed), answers(after, config.seed + 1)
    )


def mean_rewards(
    config: EvaluationConfig,
    sampler: Sampler,
    checkpoints: Sequence[Path],
    reward_model: Path,
    rows: Sequence[PromptRow],
    lengths: PpoConfig,
) -> list[float]:
    """What the reward model gives on average to the answers of each of `checkpoints`, sampled as in
    `compare`, from one seed.
    """
    tokenizer = load_tokenizer(checkpoints[0])
    chosen, prompts = _fitting(config, tokenizer, rows, lengths)
    judge = reward_judge(reward_model, lengths.unfinished_reward, config.device)
    means = []
    for folder in checkpoints:
        answers = _answer(config, sampler, folder, prompts, tokenizer, lengths, config.seed)
        scores = [score for group in _scores(judge, chosen, answers) for score in group]
        means.append(sum(scores) / len(scores))
    return means


def _fitting(
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    lengths: PpoConfig,
) -> tuple[list[PromptRow], list[list[int]]]:
    """Up to `max_prompts` of `rows`, evenly spread, and their tokens."""
    rendered = [(row, render(tokenizer, row)) for row in rows]
    fitting = [pair for pair in rendered if fits(pair[1], [], lengths.max_prompt_tokens, 0)]
    if not fitting:
        limit = f"held-out prompts of at most {lengths.max_prompt_tokens} tokens"
        raise InvalidInput("evaluation prompts", limit, f"{len(rows)} rows, none fits")
    fitting = fitting[:: -(-len(fitting) // config.max_prompts)]
    return [row for row, _ in fitting], [prompt for _, prompt in fitting]


def _answer(
    config: EvaluationConfig,
    sampler: Sampler,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    lengths: PpoConfig,
    seed: int,
) -> Answers:
    sampler.load(load_policy(folder).state_dict())
    samples = sampler.sample(prompts, lengths.max_response_tokens, seed, config.samples_per_prompt)
    texts = [
        [str(tokenizer.decode(list(s.token_ids), skip_special_tokens=True)) for s in group]
        for group in samples
    ]
    return Answers(samples, texts)


@dataclass(frozen=True)
class Verdict:
    """One judge's view. `before` and `after` hold a score for each prompt and sample."""

    win_rate: Interval
    before: list[list[float]]
    after: list[list[float]]


def judge_by(judge: Judge, comparison: Comparison) -> Verdict:
    """Win rate of `after`: over all pairs of samples of a prompt, a tie counting half; interval by
    person.
    """
    before = _scores(judge, comparison.rows, comparison.before)
    after = _scores(judge, comparison.rows, comparison.after)
    rates = [
        sum((a > b) + 0.5 * (a == b) for a in new for b in old) / (len(new) * len(old))
        for old, new in zip(before, after, strict=True)
    ]
    people = [row.user_id for row in comparison.rows]
    return Verdict(clustered_mean(rates, people), before, after)


def reward_judge(folder: Path, unfinished_reward: float, device: Device = "cpu") -> Judge:
    """The reward model in `folder` as a judge, reading text with its own tokenizer as in training.

    An answer that never stops gets `unfinished_reward`, as in PPO.
    """
    model, tokenizer = RewardModel.load(folder, device).eval(), load_tokenizer(folder)

    def judge(
        rows: Sequence[PromptRow], texts: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        sequences = [
            render(tokenizer, row)
            + (encode_response(tokenizer, text, done) or [tokenizer.eos_token_id])
            for row, text, done in zip(rows, texts, finished, strict=True)
        ]
        scores = score_sequences(model, sequences).tolist()
        return [s if done else unfinished_reward for s, done in zip(scores, finished, strict=True)]

    return judge


def _scores(judge: Judge, rows: Sequence[PromptRow], answers: Answers) -> list[list[float]]:
    repeated = [row for row, group in zip(rows, answers.texts, strict=True) for _ in group]
    texts = [text for group in answers.texts for text in group]
    finished = [s.finished for group in answers.samples for s in group]
    flat = iter(judge(repeated, texts, finished))
    return [[next(flat) for _ in group] for group in answers.texts]


@torch.no_grad()
def kl_between(
    policy: Path, reference: Path, comparison: Comparison, device: Device = "cpu"
) -> float:
    """KL(policy || reference) in nats per response, estimated on what `policy` sampled in
    `comparison.after`.
    """
    model, base = (load_policy(folder, device).eval() for folder in (policy, reference))
    prompts = [
        p
        for p, group in zip(comparison.prompts, comparison.after.samples, strict=True)
        for _ in group
    ]
    samples = [s for group in comparison.after.samples for s in group]
    pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
    logprobs, base_logprobs = response_logprobs(model, pairs), response_logprobs(base, pairs)
    return float((torch.cat(logprobs) - torch.cat(base_logprobs)).sum()) / len(samples)


@torch.no_grad()
def language_model_loss(
    folder: Path, documents: Sequence[str], max_tokens: int, device: Device = "cpu"
) -> float:
    """Mean negative log-likelihood per token, in nats, of documents cut at `max_tokens`."""
    tokenizer, model = load_tokenizer(folder), load_policy(folder, device).eval()
    encoded = [
        ids[:max_tokens]
        for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]
        if len(ids) > 1
    ]
    logprobs_M = torch.cat(response_logprobs(model, [(ids[:1], ids[1:]) for ids in encoded]))
    return -float(logprobs_M.mean())
