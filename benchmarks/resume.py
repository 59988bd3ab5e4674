"""The demo, killed with `kill -9` once in every stage and started again: does it end where an
undisturbed run ends?
"""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import Figure, figure
from contracts.errors import InstructloopError

SEED = 1
UNDISTURBED, KILLED = Path("runs/demo"), Path("runs/killed")
# A stage's first line; what it is called before its result is known.
STARTS = re.compile(r"^\[ *[\d.]+ s\] ([\w-]+)(?: \.\.\.|: starting)")
# A kill comes up to so many seconds after the stage began.
LATEST = 12.0


def measure() -> list[Figure]:
    """Run the demo of one seed twice: once in peace, once killed in every stage."""
    peace = _report(UNDISTURBED) or _finish(UNDISTURBED)
    killed: list[str] = []
    rng = random.Random(SEED)
    while not _runs_to_its_end(KILLED, killed, rng):
        print(f"killed in {killed[-1]}", flush=True)
    report = _report(KILLED)
    if report is None:
        raise InstructloopError(f"{KILLED}: the demo ended and left no report")
    same = [
        report["release"]["before"] == peace["release"]["before"],
        _stages(report) == _stages(peace),
    ]
    return [
        figure("kills", [len(killed)], "kills", ">= 9"),
        figure("same_first_release", [same[0]], "0 or 1", "1"),
        figure("same_stages", [same[1]], "0 or 1", "1"),
        figure("policy.gold_win_rate", [report["policy"]["gold_win_rate"]], "share"),
        figure("policy.gold_win_rate.undisturbed", [peace["policy"]["gold_win_rate"]], "share"),
        figure("swap.failed", [report["swap"]["failed"]], "requests", "0"),
        figure("swap.unstamped", [report["swap"]["unstamped"]], "requests", "0"),
        figure("consent.leaked_events", [report["consent"]["leaked_events"]], "events", "0"),
    ]


def _runs_to_its_end(folder: Path, killed: list[str], rng: random.Random) -> bool:
    """Start the demo; kill it in the first stage that was not killed yet. True where none is
    left.
    """
    demo = subprocess.Popen(_command(folder), stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    for line in demo.stdout:
        print(line, end="", flush=True)
        started = STARTS.match(line)
        if started and started[1].partition("-")[0] not in killed:
            killed.append(started[1].partition("-")[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                demo.wait(rng.uniform(0, LATEST))
            demo.send_signal(signal.SIGKILL)
            demo.wait()
            return False
    if demo.wait() != 0:
        raise InstructloopError(f"the demo ended with {demo.returncode}, and nobody killed it")
    return True


def _finish(folder: Path) -> dict[str, Any]:
    subprocess.run(_command(folder), check=True)
    report = _report(folder)
    assert report is not None
    return report


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "demo", "--seed", str(SEED), "--folder", str(folder)]


def _report(folder: Path) -> dict[str, Any] | None:
    file = folder / f"seed-{SEED}" / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _stages(report: dict[str, Any]) -> set[str]:
    """The stages by name; a release's name holds its digest."""
    return {name.partition("-")[0] for name in report["stages"]}
