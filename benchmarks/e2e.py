"""One round on the E2E data: human K = 5 rankings, a policy from scratch, judged by slots, BLEU and
other raters.
"""

import os
from pathlib import Path

from benchmarks.result import Figure, estimate, figure
from contracts.errors import InvalidInput
from instructloop.config import load_config
from instructloop.round import run_round

CONFIG = Path("demo/e2e.toml")


def measure() -> list[Figure]:
    """The round of demo/e2e.toml on the folder that INSTRUCTLOOP_DATA names."""
    data = os.environ.get("INSTRUCTLOOP_DATA")
    if not data:
        raise InvalidInput(
            "INSTRUCTLOOP_DATA", "the folder with demonstrations/, rankings/ and text/", data
        )
    report = run_round(load_config(CONFIG, Path(data)), print)
    reward, policy = report["reward_model"], report["policy"]
    figures = [
        estimate("reward_model.accuracy", reward["accuracy"], reward["ci95"], "share"),
        figure("policy.kl_to_sft", [policy["kl_to_sft"]], "nats per response"),
        figure("lm_loss_before", [policy["lm_loss_before"]], "nats per token"),
        figure("lm_loss_after", [policy["lm_loss_after"]], "nats per token"),
        figure("gate.passed", [float(report["gate"]["passed"])], "0 or 1"),
        figure("seconds", [sum(s["seconds"] for s in report["stages"].values())], "s", "<= 1800"),
    ]
    for name, rate in policy["win_rates"].items():
        figures.append(estimate(f"win_rate.{name}", rate["mean"], rate["ci95"], "share"))
    for name, sides in report["measures"].items():
        for side, values in sides.items():
            figures += [
                figure(f"{name}.{key}.{side}", [value], "") for key, value in values.items()
            ]
    return figures
