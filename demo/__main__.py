"""python -m demo --seed N: the one-command round."""

import argparse
import sys
import time
from pathlib import Path

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
        print("demo: stopped; the same command goes on after the last finished stage", file=sys.stderr)
        return 130
    say(summary(report, asked))
    return 0


def summary(report, asked) -> str:  # type: ignore[no-untyped-def]
    policy, reward, swap = report["policy"], report["reward_model"], report.get("swap", {})
    home = asked.folder / f"seed-{asked.seed}"
    verdict = "released" if report["gate"]["passed"] else "refused: " + "; ".join(report["gate"]["reasons"])
    return "\n".join(
        [
            f"{verdict}: {report['release']['before']} -> {report['release']['after']}",
            f"  gold win rate {policy['gold_win_rate']:.3f} {_ci(policy['gold_win_rate_ci95'])}, "
            f"KL to SFT {policy['kl_to_sft']:.2f} nats",
            f"  reward model {reward['accuracy']:.3f} {_ci(reward['ci95'])} of at most {reward['ceiling']:.3f}",
            f"  swap: pause {swap.get('pause_ms', 0):.0f} ms, {swap.get('requests_during', 0)} requests, "
            f"{swap.get('failed', 0)} failed, {swap.get('unstamped', 0)} unstamped",
            f"  leaked events: {report['consent']['leaked_events']}",
            f"report: {asked.folder / 'report.html'}",
            "serve on, with the Playground at the address that it prints:",
            f"  .venv/bin/instructloop serve --log sqlite:///{home / 'log.db'} --registry {home / 'registry'} "
            f"--keys {home / 'playground-keys.db'}",
        ]
    )


def _ci(interval) -> str:  # type: ignore[no-untyped-def]
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
