"""python -m benchmarks SUITE: measure one suite and write its figures."""

import argparse
import importlib
import os

from benchmarks.result import write
from instructloop.version import code_version

SUITES = (
    "ablations",
    "ablations_e2e",
    "advantages",
    "dataset",
    "demo",
    "e2e",
    "engines",
    "erasure",
    "faults",
    "fuzz",
    "gemm",
    "gpu",
    "groups",
    "log",
    "lora",
    "parts",
    "pii",
    "ppo",
    "resume",
    "reward_accuracy",
    "reward_model",
    "rollout",
    "schema",
    "serving",
    "sft",
    "soak",
    "swap",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    suite = parser.parse_args().suite
    commit = code_version()
    module = importlib.import_module(f"benchmarks.{suite}")
    figures = module.measure()
    for f in figures:
        print(f"{f.figure:40} {f.value:10.4f} [{f.min:.4f}, {f.max:.4f}] {f.unit} {f.goal}")
    baseline = {"trl": module.TRL} if hasattr(module, "TRL") else {}
    quick = "QUICK=1 " if os.environ.get("QUICK", "") not in {"", "0"} else ""
    print(write(suite, f"{quick}make bench SUITE={suite}", commit, figures, baseline))


if __name__ == "__main__":
    main()
