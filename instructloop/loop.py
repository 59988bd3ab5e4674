"""One round on one page: dataset > reward model > policy > evaluation > gate > release."""

import datetime as dt
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.dataset import MANIFEST, DatasetManifest
from contracts.errors import GateRefused, InvalidInput, NotReviewed
from contracts.events import Stamper
from contracts.release import Release, ReleaseRegistry
from contracts.v1 import events_pb2 as pb
from feedback.dataset.build import build_dataset
from feedback.dataset.review import Reviews
from feedback.dataset.segment import Outlines
from instructloop.adapter import merge
from instructloop.stages import Stages
from instructloop.work import (
    Loop,
    choose_checkpoint,
    evaluate,
    fine_tune,
    rows_of,
    train_base,
    train_policy,
    train_reward_models,
)
from training.lora import adapter_over
from training.metrics import read_metrics
from training.model import canary_of


def first_release(loop: Loop) -> Release:
    """Base model from scratch > SFT on the demonstrations so far > the release that a loop starts
    from.
    """
    config, stages = loop.config, loop.stages
    if (current := loop.registry.current()) is not None:
        return current
    if config.base is None:
        raise InvalidInput(
            "base", "a [base] section, or a released model: instructloop serve --model FOLDER", None
        )
    digest = stages.run("demonstrations", lambda _: {"digest": _dataset(loop)})["digest"]
    stages.run("base", lambda folder: train_base(loop, digest, folder))
    stages.run("sft", lambda folder: fine_tune(loop, digest, stages.path("base") / "model", folder))
    return publish(loop, _describe(loop, stages.path("sft") / "model", parent=None, dataset=digest))


@dataclass(frozen=True)
class Candidate:
    """A policy that passed the gate, and what it was made of."""

    model: Path
    parent: Release
    dataset: str
    reward_model: Path
    figures: dict[str, float]


def one_round(loop: Loop) -> Release:
    """From what people said so far to a release that passed the gate. Raises GateRefused."""
    return publish(loop, describe(loop, train_candidate(loop)))


def train_candidate(loop: Loop) -> Candidate:
    """The round up to the gate; every stage that was finished before is taken from the run's
    folder.
    """
    # 1. Dataset: what may be used of what people said.
    stages, parent = loop.stages, parent_of(loop)
    before = _weights(loop, parent)
    digest = stages.run("dataset", lambda _: {"digest": _dataset(loop)})["digest"]

    # 2. A model that was brought from outside first learns from the demonstrations.
    reference = before
    if parent.dataset is None and rows_of(loop, digest, "sft"):
        stages.run("sft", lambda folder: fine_tune(loop, digest, before, folder))
        reference = stages.path("sft") / "model"

    # 3. Reward model, from rankings; another one of other raters' to judge, where asked for.
    stages.run("reward_model", lambda folder: train_reward_models(loop, digest, reference, folder))
    rewards = stages.path("reward_model")

    # 4. Policy: PPO-ptx against the reward model, from the SFT checkpoint that it likes best.
    if loop.config.sft.choose_by_reward and stages.done("sft"):
        sft = stages.path("sft")
        chosen = stages.run(
            "choose", lambda _: choose_checkpoint(loop, digest, sft, rewards / "model")
        )
        reference = sft / chosen["checkpoint"]
    stages.run(
        "ppo", lambda folder: train_policy(loop, digest, reference, rewards / "model", folder)
    )
    after = stages.path("ppo") / "model"

    # 5. Evaluation on the prompts of held-out people, and the gate.
    verdict = stages.run(
        "evaluate", lambda _: evaluate(loop, digest, before, reference, after, rewards)
    )
    if verdict["reasons"]:
        raise GateRefused(verdict["reasons"])

    return Candidate(after, parent, digest, rewards / "model", verdict["figures"])


def describe(loop: Loop, candidate: Candidate) -> Release:
    """6. Release: the candidate by its digests, not yet public."""
    return _describe(
        loop,
        candidate.model,
        parent=candidate.parent,
        dataset=candidate.dataset,
        reward_model=loop.registry.artifacts.put("reward_model", candidate.reward_model),
        evaluation={name: x for name, x in candidate.figures.items() if math.isfinite(x)},
    )


def publish(loop: Loop, described: Release) -> Release:
    """Make a release current; servers notice by themselves. Once or again, the log says it once."""
    loop.registry.publish(described)
    change = pb.ReleaseChange(
        release_id=described.id,
        release_digest=described.artifact,
        transition=pb.RELEASE_TRANSITION_PUBLISHED,
    )
    event_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"instructloop:published:{described.id}"))
    loop.sink.append([Stamper("loop").event(described.model, change, id=event_id)])
    return described


def parent_of(loop: Loop) -> Release:
    """The release that this round starts from, the same when the round is taken up again."""
    parent = first_release(loop)
    started = loop.stages.run("parent", lambda _: {"release": parent.id})
    return loop.registry.get(started["release"])


def _weights(loop: Loop, release: Release) -> Path:
    """The folder of a release's whole weights: an adapter is merged into those that it adapts."""
    artifacts = loop.registry.artifacts
    policy = artifacts.path(release.artifact)
    if release.base is None:
        return policy
    base = artifacts.path(release.base)

    def work(folder: Path) -> dict[str, Any]:
        merge(base, policy, folder / "model")
        return {"base": release.base}

    loop.stages.run("merge", work)
    return loop.stages.path("merge") / "model"


def _dataset(loop: Loop) -> str:
    """What may be used of what people said. Raises NotReviewed where a person must look first."""
    reviews = Reviews(loop.registry)
    digest = build_dataset(
        loop.source,
        loop.registry.artifacts,
        loop.config.rules,
        loop.code_version,
        decisions=reviews.decisions(),
        outlines=Outlines.below(loop.registry),
    )
    if waiting := reviews.waiting(digest):
        raise NotReviewed(digest, len(waiting))
    return digest


def _describe(
    loop: Loop,
    model: Path,
    *,
    parent: Release | None,
    dataset: str | None,
    reward_model: str | None = None,
    evaluation: dict[str, float] | None = None,
) -> Release:
    """A release of the model in a stage's folder, the same one however often the run is taken up
    again.
    """
    registry = loop.registry
    artifact, base = _stored(registry, model, parent)

    def work(_: Path) -> dict[str, Any]:
        described = Release(
            id=registry.next_id(artifact),
            model=loop.config.model,
            created=dt.datetime.now(dt.UTC),
            artifact=artifact,
            base=base,
            canary=canary_of(model),
            parent=parent.id if parent else None,
            dataset=dataset,
            reward_model=reward_model,
            code_version=loop.code_version,
            evaluation=evaluation or {},
        )
        return {"release": described.model_dump(mode="json")}

    return Release.model_validate(loop.stages.run(f"release-{artifact[:8]}", work)["release"])


def _stored(
    registry: ReleaseRegistry, model: Path, parent: Release | None
) -> tuple[str, str | None]:
    """The policy in a stage's folder as an artifact, and the one that it adapts. An adapter of the
    weights that the parent runs on is stored as such, since servers switch to it without a pause;
    any other policy is stored whole.
    """
    if parent is not None:
        running = parent.base or parent.artifact
        adapter = adapter_over(model, registry.artifacts.path(running))
        if adapter is not None:
            return registry.artifacts.put("adapter", adapter), running
    return registry.artifacts.put("policy", model), None


def dataset_manifest(registry: ReleaseRegistry, digest: str) -> DatasetManifest:
    return DatasetManifest.model_validate_json(
        (registry.artifacts.path(digest) / MANIFEST).read_bytes()
    )


def ppo_figures(stages: Stages) -> list[dict[str, float]]:
    """What PPO wrote each iteration."""
    return read_metrics(stages.path("ppo"))
