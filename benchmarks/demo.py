"""The demo on three seeds: does a round make the policy better, and does nobody notice the swap?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import Figure, figure
from demo.round import run_demo

SEEDS = (1, 2, 3)


def measure() -> list[Figure]:
    """Run all seeds one after another, below runs/demo."""
    return figures([run_demo(seed, Path("runs/demo"), print) for seed in SEEDS])


def figures(reports: Sequence[dict[str, Any]]) -> list[Figure]:
    """The figures of these runs' reports."""

    def each(*path: str | int) -> list[float]:
        return [float(_at(report, path)) for report in reports]

    return [
        figure("policy.gold_win_rate", each("policy", "gold_win_rate"), "share"),
        figure(
            "policy.gold_win_rate_ci95_low",
            each("policy", "gold_win_rate_ci95", 0),
            "share",
            "> 0.55",
        ),
        figure("policy.kl_to_sft", each("policy", "kl_to_sft"), "nats per response"),
        figure("reward_model.accuracy", each("reward_model", "accuracy"), "share"),
        figure(
            "reward_model.ceiling_minus_accuracy",
            [r["reward_model"]["ceiling"] - r["reward_model"]["accuracy"] for r in reports],
            "share",
            "<= 0.05",
        ),
        figure("swap.pause_ms", each("swap", "pause_ms"), "ms"),
        figure("swap.requests_during", each("swap", "requests_during"), "requests"),
        figure("swap.failed", each("swap", "failed"), "requests", "0"),
        figure("swap.unstamped", each("swap", "unstamped"), "requests", "0"),
        figure("consent.leaked_events", each("consent", "leaked_events"), "events", "0"),
        figure("seconds", each("seconds"), "s", "<= 720"),
    ]


def _at(report: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        report = report[key]
    return report
