"""python -m demo --seed N: the one-command round."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from contracts.errors import InstructloopError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    asked = parser.parse_args()
    from demo.round import run_demo

    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", flush=True)

    try:
        report = run_demo(asked.seed, asked.folder, say)
    except InstructloopError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "demo: stopped; the same command goes on after the last finished stage", file=sys.stderr
        )
        return 130
    say(summary(report, asked))
    return 0


def summary(report: dict[str, Any], asked: argparse.Namespace) -> str:
    policy, reward, swap = report["policy"], report["reward_model"], report.get("swap", {})
    gate, names = report["gate"], report["release"]
    home = asked.folder / f"seed-{asked.seed}"
    serve = (
        f".venv/bin/instructloop serve --log sqlite:///{home / 'log.db'}"
        f" --registry {home / 'registry'} --keys {home / 'playground.db'}"
    )
    return f"""\
{"released" if gate["passed"] else "refused: " + "; ".join(gate["reasons"])}: \
{names["before"]} -> {names["after"]}
  gold win rate  {policy["gold_win_rate"]:.3f} {_ci(policy["gold_win_rate_ci95"])}, \
KL to SFT {policy["kl_to_sft"]:.2f} nats a response
  reward model   {reward["accuracy"]:.3f} {_ci(reward["ci95"])}, ceiling {reward["ceiling"]:.3f}
  swap           pause {swap.get("pause_ms", 0):.0f} ms, \
{swap.get("requests_during", 0)} requests, {swap.get("failed", 0)} failed, \
{swap.get("unstamped", 0)} unstamped
  leaked events  {report["consent"]["leaked_events"]}
report: {asked.folder / "report.html"}
serve on, with the Playground at the address that this prints:
  {serve}"""


def _ci(interval: list[float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
