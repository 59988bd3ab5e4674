"""Session fixture: a real Kafka broker."""

import os
import shutil
from collections.abc import Iterator

import pytest

from demo.broker import JARS, Cluster


@pytest.fixture(scope="session")
def kafka_parts() -> None:
    """What a broker is made of is there; where it is not, the test is skipped, and fails in CI."""
    missing = [] if shutil.which("java") else ["java"]
    missing += [] if list(JARS.glob("kafka_2.13-*.jar")) else [str(JARS)]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"no {missing}: run make kafkajars")
    if missing:
        pytest.skip(f"no {missing}: run make kafkajars")


@pytest.fixture(scope="session")
def kafka(kafka_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node for tests that leave it alone; each takes a namespace of its own."""
    cluster = Cluster(tmp_path_factory.mktemp("kafka"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def kcat() -> str:
    """Debian's command-line client: not ours, not Python, another library."""
    found = shutil.which("kcat")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("no kcat: apt-get install kcat")
    return found or pytest.skip("no kcat: apt-get install kcat")
