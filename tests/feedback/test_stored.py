"""Stored completions over the log whose texts are encrypted, as the service opens it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from contracts.log import follow
from feedback.app import create_app
from feedback.consent import ConsentLedger
from feedback.vault import open_events
from feedback.vault.sealed import SealedLog
from tests.feedback.samples import completion, consent
from tests.feedback.test_app import ANN, BOB, authenticate

TEXTS = {"edits": "the heron waits", "comments": "the otter laughs"}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SealedLog]:
    log = open_events(f"sqlite:///{tmp_path}/log.db")
    log.append([consent("ann"), consent("bob")])
    log.append([completion("ann", "c1"), completion("bob", "c2"), completion("ann", "c3")])
    yield log
    log.close()


@pytest.fixture
def client(log: SealedLog) -> TestClient:
    app = create_app(sink=log, source=log, authenticate=authenticate, consent=ConsentLedger(log))
    return TestClient(app)


def kept(client: TestClient, who: dict[str, str]) -> list[str]:
    return [each["id"] for each in client.get("/v1/completions", headers=who).json()["data"]]


def test_edits_and_comments_are_read_whole_and_stored_as_ciphertext(
    client: TestClient, log: SealedLog, tmp_path: Path
) -> None:
    for kind, text in TEXTS.items():
        said = {"completion_id": "c1", "output": 0, "text": text}
        assert client.post(f"/v1/feedback/{kind}", headers=ANN, json=said).status_code == 200
        (record,) = follow(log, kind, {})
        assert getattr(record.event, kind.removesuffix("s")).text == text
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [text for text in TEXTS.values() if text.encode() in files]
    assert client.get("/v1/completions/c1", headers=ANN).json()["prompt"] == "hello"


def test_what_its_person_erased_is_not_there(client: TestClient, log: SealedLog) -> None:
    assert (kept(client, ANN), kept(client, BOB)) == (["c1", "c3"], ["c2"])
    log.erase("ann")
    log.append([consent("ann")])
    assert (kept(client, ANN), kept(client, BOB)) == ([], ["c2"])
    assert client.get("/v1/completions/c1", headers=ANN).status_code == 404
    said = {"completion_id": "c1", "text": "more"}
    assert client.post("/v1/feedback/comments", headers=ANN, json=said).status_code == 404
