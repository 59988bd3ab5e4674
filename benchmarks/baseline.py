"""A baseline in an environment of its own, and runs of several sides in turn."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".baselines"
UV = ROOT / ".uv/bin/uv"
Run = dict[str, float]


class Baseline:
    """A module of `benchmarks.trl` in a process under one release of TRL, which is installed first.

    Its torch and transformers are those of this environment, so that only TRL differs.
    """

    def __init__(self, module: str, trl: str) -> None:
        python = _environment(trl)
        command = [str(python), "-m", f"benchmarks.trl.{module}"]
        log = (ENVIRONMENTS / f"{module}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self._log = log.name

    def run(self, **settings: Any) -> Run:
        """One run there; seconds of wall and process, and the figures to agree on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the baseline ended; see {self._log}")
        run: Run = json.loads(answer)
        return run

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _environment(trl: str) -> Path:
    """The interpreter of the environment of this TRL; made once."""
    import torch
    import transformers

    folder = ENVIRONMENTS / f"trl-{trl}"
    python = folder / "bin/python"
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([UV, "venv", "-q", "--clear", "--python", "3.11", folder], check=True)
        wanted = [
            f"torch=={torch.__version__.partition('+')[0]}",
            f"transformers=={transformers.__version__}",
            f"trl=={trl}",
        ]
        subprocess.run([UV, "pip", "install", "-q", "--python", python, *wanted], check=True)
        ready.touch()
    return python


def in_turn(sides: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, list[Run]]:
    """`runs` runs of every side, one round after another, each round from another side on; the
    round before them is not counted.
    """
    names = list(sides)
    found: dict[str, list[Run]] = {name: [] for name in names}
    for i in range(-1, runs):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            run = sides[name]()
            print(f"{name:12s} {run['wall']:8.2f} s wall {run['cpu']:8.2f} s CPU", flush=True)
            if i >= 0:
                found[name].append(run)
    return found


def ratios(slow: Sequence[Run], fast: Sequence[Run], clock: str = "cpu") -> list[float]:
    """Of each round: how many times longer `slow` took."""
    return [a[clock] / b[clock] for a, b in zip(slow, fast, strict=True)]


def agree(name: str, ours: float, theirs: float, tolerance: float) -> None:
    """Raise where two sides that should compute the same did not."""
    if not abs(ours - theirs) <= tolerance:
        raise RuntimeError(f"{name}: expected {theirs} as the baseline, got {ours}")
