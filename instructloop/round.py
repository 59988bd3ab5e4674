"""A round on a log that is already there, or on public files: what `instructloop loop` runs."""

import datetime as dt
import os
import platform
from pathlib import Path
from typing import Any

import torch

from contracts.errors import GateRefused
from contracts.release import ReleaseRegistry
from feedback.importers import import_file
from feedback.vault import open_events
from instructloop.config import RoundConfig
from instructloop.crew import Together, alone
from instructloop.loop import dataset_manifest, one_round, parent_of, ppo_figures
from instructloop.report import write_report
from instructloop.stages import Say, Stages
from instructloop.text import read_documents
from instructloop.version import code_version
from instructloop.work import Loop
from training.device import Device
from training.model import hide_progress_bars

STAGES = "stages"


def run_round(config: RoundConfig, say: Say, together: Together = alone) -> dict[str, Any]:
    """Import, train, judge and release as `config` says; returns the report that it wrote to the
    run's folder.

    A refused policy is not an error of the run: the report says why, and nothing is released.
    """
    hide_progress_bars()
    version = code_version()
    identity = {"config": config.model_dump(mode="json"), "code": version}
    stages = Stages(config.run / STAGES, identity, say)
    log = open_events(config.log)
    for wanted in config.imports:
        found = import_file(wanted.format, Path(wanted.path), log)
        say(
            f"import {wanted.format} {wanted.path}: {found.rows} rows, "
            f"{len(found.malformed)} malformed"
        )
        for bad in found.malformed[:5]:
            say(f"  {bad}")
    loop = Loop(
        config,
        log,
        log,
        ReleaseRegistry(config.registry),
        stages,
        read_documents(config.text),
        version,
        together,
    )
    before = parent_of(loop)
    try:
        after, reasons = one_round(loop).id, list[str]()
    except GateRefused as refused:
        after, reasons = before.id, refused.reasons
    report = round_report(loop, before.id, after, reasons)
    write_report(report, config.run)
    log.close()
    say(f"report: {config.run / 'report.html'}")
    return report


def round_report(
    loop: Loop, before: str, after: str, reasons: list[str], judge: str | None = None
) -> dict[str, Any]:
    """What happened in a round, from its stages' figures; scores of answers are `judge`'s, by
    default the gate's.
    """
    judge = judge or loop.config.gate.judge
    stages = loop.stages

    reward, verdict = stages.result("reward_model"), stages.result("evaluate")
    manifest = dataset_manifest(loop.registry, stages.result("dataset")["digest"])
    known = verdict["figures"]
    return {
        "seed": loop.config.seed,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(loop.config.device),
        "code_version": loop.code_version,
        "release": {"before": before, "after": after},
        "gate": {"passed": not reasons, "reasons": reasons},
        "reward_model": {k: v for k, v in reward.items() if k != "seconds"},
        "policy": {
            "kl_to_sft": known["kl"],
            "lm_loss_before": known.get("lm_loss_before"),
            "lm_loss_after": known.get("lm_loss_after"),
            "win_rates": verdict["win_rates"],
            "reward_win_rate": verdict["win_rates"]["reward_model"]["mean"],
            "reward_win_rate_ci95": verdict["win_rates"]["reward_model"]["ci95"],
            "disagreement": {k: v for k, v in known.items() if k.startswith("disagreement_")},
        },
        "measures": verdict["measures"],
        "ppo": [{"iteration": int(row["step"]), **row} for row in ppo_figures(stages)],
        "dataset": {
            "rules": [rule.model_dump(mode="json") for rule in manifest.rules],
            "rows": manifest.rows,
        },
        "by_use_case": by_use_case(verdict["answers"], judge),
        "samples": samples(verdict["answers"], judge),
        "stages": stages.seconds(),
    }


def by_use_case(answers: list[dict[str, Any]], judge: str) -> dict[str, dict[str, float]]:
    """Mean score of each policy by use case, as `judge` sees it."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        cases.setdefault(row["use_case"] or "unlabelled", []).append(row)
    return {
        name: {
            "before": _mean([s for row in rows for s in row["before_scores"][judge]]),
            "after": _mean([s for row in rows for s in row["after_scores"][judge]]),
            "prompts": len(rows),
        }
        for name, rows in sorted(cases.items())
    }


def samples(answers: list[dict[str, Any]], judge: str, count: int = 12) -> list[dict[str, Any]]:
    """A few prompts, evenly spread over the evaluated ones: not chosen by how well they went."""
    stride = max(1, len(answers) // count)
    return [
        {
            **{k: row[k] for k in ("use_case", "prompt", "before", "after")},
            "before_score": row["before_scores"][judge][0],
            "after_score": row["after_scores"][judge][0],
        }
        for row in answers[::stride][:count]
    ]


def machine(device: Device) -> dict[str, str | int]:
    """This one, with the GPU on which a round learned."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        **gpu,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
