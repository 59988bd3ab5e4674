"""What each stage of a round does: rows in, a folder and its figures out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contracts.errors import InvalidInput
from contracts.log import EventSink, EventSource
from contracts.release import ReleaseRegistry
from instructloop.config import RoundConfig
from instructloop.crew import Together, alone
from instructloop.stages import Stages
from instructloop.text import hold_out
from training.config import PpoConfig, RewardModelConfig, SftConfig
from training.data import PromptRow, RankedRow, SftRow, prompt_text, read_set
from training.engines import Engines
from training.evaluation.comparison import (
    Comparison,
    Verdict,
    compare,
    judge_by,
    kl_between,
    language_model_loss,
    mean_rewards,
    reward_judge,
)
from training.evaluation.reward_models import (
    answers_disagreement,
    cross_validate,
    held_out_figures,
)
from training.gate import decide
from training.metrics import Metrics
from training.ppo import train_ppo
from training.pretrain import pretrain
from training.reward_model import train_reward_model
from training.rollout import Engine, Sampler
from training.sft import train_sft

# A reward model of another seed.
MEMBER = "member-{}"


@dataclass(frozen=True)
class Loop:
    """What a round works with. `documents` are for the base model and the pretraining mix; where
    several ranks train, they do so `together`.
    """

    config: RoundConfig
    source: EventSource
    sink: EventSink
    registry: ReleaseRegistry
    stages: Stages
    documents: Sequence[str]
    code_version: str
    together: Together = alone


def rows_of(loop: Loop, digest: str, name: Any, split: Any = "train") -> list[Any]:
    return read_set(loop.registry.artifacts.path(digest), name, split)


def train_base(loop: Loop, digest: str, folder: Path) -> dict[str, Any]:
    assert loop.config.base is not None
    metrics = Metrics(folder)
    texts, _ = hold_out(loop.documents)
    sheets = [f"{prompt_text(row)}\n{row.response}" for row in rows_of(loop, digest, "sft")]
    pretrain(loop.config.base, [*texts, *sheets], folder / "model", metrics)
    metrics.close()
    return {
        "documents": len(texts),
        "demonstrations": len(sheets),
        "loss": metrics.rows[-1]["loss"],
    }


def fine_tune(loop: Loop, digest: str, parent: Path, folder: Path) -> dict[str, Any]:
    rows: list[SftRow] = rows_of(loop, digest, "sft")
    held_out: list[SftRow] = rows_of(loop, digest, "sft", "validation")
    texts, _ = hold_out(loop.documents)
    figures = loop.together(_sft, folder, loop.config.sft, parent, rows, held_out, texts)
    return {"demonstrations": len(rows), "validation_loss": figures[-1]["validation_loss"]}


def _sft(
    folder: Path,
    config: SftConfig,
    parent: Path,
    rows: Sequence[SftRow],
    held_out: Sequence[SftRow],
    texts: Sequence[str],
) -> list[dict[str, float]]:
    with closing(Metrics(folder)) as metrics:
        train_sft(config, parent, rows, held_out, folder / "model", metrics, texts)
    return metrics.rows


def train_reward_models(loop: Loop, digest: str, reference: Path, folder: Path) -> dict[str, Any]:
    config = loop.config.reward_model
    start = config.base or reference
    demonstrations: list[SftRow] = rows_of(loop, digest, "sft")
    judging, training = _split_raters(rows_of(loop, digest, "rm"), loop.config.judge_raters)

    def train(name: str, rows: list[RankedRow], seed: int) -> Path:
        own = config.model_copy(update={"seed": seed})
        loop.together(_reward_model, folder / name, own, start, rows, demonstrations)
        return folder / name

    names = ["model", *map(MEMBER.format, range(1, config.ensemble))]
    # Far apart, so that no other round of the same experiment has the same members.
    members = [train(name, training, config.seed + 1000 * n) for n, name in enumerate(names)]
    if judging:
        train("judge", judging, config.seed)
    figures: dict[str, Any] = {"rankings": len(training), "judge_rankings": len(judging)}
    figures |= held_out_figures(config, members, rows_of(loop, digest, "rm", "test"))
    if config.folds:
        figures["folds"] = cross_validate(config, start, training, demonstrations)
    return figures


def _reward_model(
    folder: Path,
    config: RewardModelConfig,
    start: Path,
    rows: Sequence[RankedRow],
    demonstrations: Sequence[SftRow],
) -> None:
    with closing(Metrics(folder.with_name(f"{folder.name}-metrics"))) as metrics:
        train_reward_model(config, start, rows, demonstrations, folder, metrics)


def choose_checkpoint(loop: Loop, digest: str, sft: Path, reward: Path) -> dict[str, Any]:
    """The epoch of SFT whose answers to validation prompts the reward model likes best."""
    config = loop.config
    names = [f"epoch-{n}" for n in range(1, config.sft.epochs + 1)]
    rows: list[PromptRow] = rows_of(loop, digest, "ppo", "validation")
    sampler = _sampler(config.ppo, sft / names[0])()
    try:
        folders = [sft / name for name in names]
        means = mean_rewards(config.evaluation, sampler, folders, reward, rows, config.ppo)
    finally:
        sampler.close()
    scores = dict(zip(names, means, strict=True))
    return {"checkpoint": max(names, key=scores.__getitem__), "mean_rewards": scores}


def _split_raters(
    rows: list[RankedRow], judge_share: float
) -> tuple[list[RankedRow], list[RankedRow]]:
    """(rankings that train the judge, rankings that train the reward model); a rater is on one side
    only.
    """

    def judges(rater: str) -> bool:
        return (
            int(hashlib.sha256(f"judge:{rater}".encode()).hexdigest()[:8], 16) / 2**32 < judge_share
        )

    return [r for r in rows if judges(r.rater_id)], [r for r in rows if not judges(r.rater_id)]


def _sampler(config: PpoConfig, model: Path) -> Callable[..., Sampler]:
    tokens = config.max_prompt_tokens + config.max_response_tokens
    return partial(Sampler, model, tokens, config.precision, config.engine_memory)


def _engine(config: PpoConfig, model: Path) -> Engine:
    """What PPO draws on."""
    make = _sampler(config, model)
    return Engines(config.engines, make) if config.engines else make()


def train_policy(
    loop: Loop, digest: str, reference: Path, reward: Path, folder: Path
) -> dict[str, Any]:
    texts, _ = hold_out(loop.documents)
    prompts: list[PromptRow] = rows_of(loop, digest, "ppo")
    figures = loop.together(_ppo, folder, loop.config.ppo, reference, reward, prompts, texts)
    return {"prompts": len(prompts), "iterations": len(figures), "kl": figures[-1]["kl"]}


def _ppo(
    folder: Path,
    config: PpoConfig,
    reference: Path,
    reward: Path,
    prompts: Sequence[PromptRow],
    texts: Sequence[str],
) -> list[dict[str, float]]:
    with closing(Metrics(folder)) as metrics, closing(_engine(config, reference)) as sampler:
        train_ppo(config, reference, reward, prompts, texts, sampler, folder / "model", metrics)
    return metrics.rows


def evaluate(
    loop: Loop, digest: str, before: Path, reference: Path, after: Path, rewards: Path
) -> dict[str, Any]:
    config = loop.config
    rows: list[PromptRow] = rows_of(loop, digest, "ppo", "test")
    if not rows:
        raise InvalidInput(
            "dataset", "prompts of held-out people to evaluate on", "none in the test split"
        )
    sampler = _sampler(config.ppo, after)()
    try:
        answers = compare(config.evaluation, sampler, before, after, rows, config.ppo)
    finally:
        sampler.close()
    judges = {name: plugin.load() for name, plugin in config.judges.items()}
    device = config.device
    judge_of = partial(reward_judge, unfinished_reward=config.ppo.unfinished_reward, device=device)
    judges["reward_model"] = judge_of(rewards / "model")
    if (rewards / "judge").exists():
        judges["second_reward_model"] = judge_of(rewards / "judge")
    if config.gate.judge not in judges:
        raise InvalidInput("gate.judge", "one of " + ", ".join(sorted(judges)), config.gate.judge)
    verdicts = {name: judge_by(judge, answers) for name, judge in judges.items()}

    _, held_out = hold_out(loop.documents)
    figures = {f"win_rate.{name}": v.win_rate.mean for name, v in verdicts.items()}
    if members := sorted(rewards.glob(MEMBER.format("*[0-9]"))):
        others = [judge_by(judge_of(member), answers) for member in members]
        figures |= answers_disagreement([verdicts["reward_model"], *others])
    figures["kl"] = kl_between(after, reference, answers, device)
    if held_out:
        width = config.ppo.max_prompt_tokens
        figures["lm_loss_before"] = language_model_loss(before, held_out, width, device)
        figures["lm_loss_after"] = language_model_loss(after, held_out, width, device)
    rise = figures.get("lm_loss_after", 0.0) - figures.get("lm_loss_before", 0.0)
    people = len({row.user_id for row in answers.rows})
    win_rate = verdicts[config.gate.judge].win_rate
    decision = decide(config.gate, win_rate, people, figures["kl"], rise)
    return {
        "reasons": list(decision.reasons),
        "figures": figures,
        "win_rates": {
            name: {"mean": v.win_rate.mean, "ci95": v.win_rate.ci95} for name, v in verdicts.items()
        },
        "measures": {
            name: _measure(plugin.load(), answers) for name, plugin in config.measures.items()
        },
        "answers": _table(answers, verdicts),
    }


def _measure(measure: Any, answers: Comparison) -> dict[str, Any]:
    """The measure of all answers of each policy; rows repeat once for each sample."""
    return {
        side: measure(
            [row for row, group in zip(answers.rows, texts, strict=True) for _ in group],
            [text for group in texts for text in group],
        )
        for side, texts in (("before", answers.before.texts), ("after", answers.after.texts))
    }


def _table(answers: Comparison, verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """The first answer of each policy to each prompt, and every judge's scores of all answers, for
    the report.
    """
    return [
        {
            "use_case": row.use_case,
            "prompt": prompt_text(row),
            "before": answers.before.texts[i][0],
            "after": answers.after.texts[i][0],
            "before_scores": {name: v.before[i] for name, v in verdicts.items()},
            "after_scores": {name: v.after[i] for name, v in verdicts.items()},
        }
        for i, row in enumerate(answers.rows)
    ]
