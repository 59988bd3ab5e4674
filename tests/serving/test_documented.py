"""What the OpenAPI document says is what the whole application does."""

from pathlib import Path

from tests.serving.documented import ask_all
from tests.serving.house import house


def test_schemathesis_finds_nothing_that_differs_from_the_document(tmp_path: Path) -> None:
    with house(tmp_path / "house") as here:
        found = ask_all(here, tmp_path, examples=3)
        assert not found.failures, found.said
        assert found.cases > 1500
        # Not by refusing everything.
        assert len(here.engine.asked) > 200
        for topic in ("rankings", "ratings", "edits", "comments", "consents"):
            assert here.events(topic), topic
