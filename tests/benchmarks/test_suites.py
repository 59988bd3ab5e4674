import importlib

import pytest

from benchmarks.__main__ import SUITES


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_there(suite: str) -> None:
    """A suite is run seldom: that it no longer fits what it measures is seen here."""
    assert callable(importlib.import_module(f"benchmarks.{suite}").measure)
