"""The ablations on human rankings of E2E, a suite of their own: they need data from outside."""

from benchmarks.ablations import measured
from benchmarks.result import Figure


def measure() -> list[Figure]:
    """The data is in the folder that INSTRUCTLOOP_DATA names."""
    return measured("e2e")
