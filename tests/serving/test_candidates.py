"""Several releases behind everything that `instructloop serve` puts together, on a fake engine."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from feedback.dataset.build import build_dataset
from feedback.dataset.settings import RuleSettings
from serving.settings import Settings
from tests.serving.house import House, house, publish, publish_adapter

ASK = {"model": "tiny", "prompt": "say", "max_tokens": 2}
BOTH = [{"release": "r2", "n": 2}, {"release": "r1"}]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """r3 is served; r2 and the base of both, r1, are loaded beside it."""
    root = tmp_path_factory.mktemp("candidates")
    with house(root, Settings(release_poll_s=0.02, max_adapters=2)) as running:
        running.registry.pin("r1")
        publish(running.registry, root, "w1")  # whole weights, which are not loaded beside others
        running.registry.swap_to("r1")
        running.registry.unpin()
        for release_id in ("r2", "r3"):
            publish_adapter(running.registry, root, release_id)
            wait_until_served(running, release_id)
        yield running


def wait_until_served(here: House, release_id: str) -> None:
    deadline = time.monotonic() + 20
    while httpx.get(f"{here.url}/readyz").json()["release"] != release_id:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def word(here: House, release_id: str) -> str:
    """What the fake engine says first by this release."""
    return f"{here.registry.get(release_id).artifact[:6]}-0 "


def post(here: House, body: Any, user: str = "ann", **headers: str) -> httpx.Response:
    with here.client(user) as client:
        return client.post("/v1/feedback/candidates", json=body, headers=headers)


def test_each_loaded_release_is_asked_by_name_and_listed(here: House) -> None:
    with here.client("bob") as client:
        listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert listed == ["tiny", "tiny@r1", "tiny@r2", "tiny@r3"]
        assert client.get("/v1/models/tiny@r2").json()["id"] == "tiny@r2"
        assert client.get("/v1/releases").json()["loaded"] == ["r1", "r2", "r3"]
        for asked, by in (("tiny", "r3"), ("tiny@r1", "r1"), ("tiny@r2", "r2"), ("tiny@r3", "r3")):
            answer = client.post("/v1/completions", json={**ASK, "model": asked, "max_tokens": 1})
            said = answer.json()
            assert answer.headers["x-policy-release"] == said["system_fingerprint"] == by
            assert said["choices"][0]["text"] == word(here, by) and said["model"] == "tiny"
        missing = client.post("/v1/completions", json={**ASK, "model": "tiny@r9"})
        assert missing.status_code == 404 and "`tiny@r1`, `tiny@r2`" in missing.text


def test_a_person_is_answered_by_the_release_that_has_them(here: House) -> None:
    def by(user: str) -> str:
        with here.client(user) as client:
            answer = client.post("/v1/completions", json={**ASK, "stream": True})
        assert answer.headers["x-policy-release"] in answer.text
        return answer.headers["x-policy-release"]

    people = [f"user-{i}" for i in range(40)]
    with here.client("root", "admin") as admin:
        told = admin.post("/v1/admin/share", json={"release": "r2", "share": 0.4})
        assert told.json()["shares"] == {"r2": 0.4} and told.json()["serving"] == "r3"
        taken = [by(person) for person in people]
        assert {*taken} == {"r2", "r3"} and taken == [by(person) for person in people]
        assert taken == [here.registry.shares().release_of(p) or "r3" for p in people]
        for wrong, status in (("r9", 404), ("r2/", 400)):
            answer = admin.post("/v1/admin/share", json={"release": wrong, "share": 0.1})
            assert answer.status_code == status
        over = admin.post("/v1/admin/share", json={"release": "r1", "share": 0.7})
        assert (over.status_code, over.json()["error"]["param"]) == (400, "share")
        unfit = admin.post("/v1/admin/share", json={"release": "w1", "share": 0.1})
        assert unfit.status_code == 409 and "w1 has a share and is not loaded" in unfit.text
        for release_id in ("w1", "r2"):
            none = admin.post("/v1/admin/share", json={"release": release_id, "share": 0})
        assert none.json()["shares"] == {}
    assert {by(person) for person in people} == {"r3"}


def test_candidates_are_one_completion_whose_choices_name_their_release(here: House) -> None:
    answer = post(here, {**ASK, "candidates": BOTH})
    said = answer.json()
    assert answer.status_code == 200, said
    choices = [(c["index"], c["release"], c["text"].split()[0]) for c in said["choices"]]
    two, one = word(here, "r2").strip(), word(here, "r1").strip()
    assert choices == [(0, "r2", two), (1, "r2", two), (2, "r1", one)]
    assert said["object"] == "text_completion" and said["model"] == "tiny"
    assert answer.headers["x-policy-release"] == said["system_fingerprint"] == "r2,r1"
    # The fake engine reads 5 tokens for each release, and writes 2 for each choice.
    assert said["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
    assert "release_digest" not in answer.text and "token_ids" not in answer.text


def test_candidates_are_kept_ranked_and_read_into_a_dataset(here: House) -> None:
    messages = [{"role": "user", "content": "hi there"}]
    ask = {"model": "tiny", "messages": messages, "max_tokens": 2, "candidates": BOTH}
    answer = post(here, ask)
    assert answer.headers["x-instructloop-recorded"] == "true"
    completion_id = answer.json()["id"]
    with here.client("ann") as ann:
        ranking = {"completion_id": completion_id, "groups": [[2], [0, 1]]}
        ranked = ann.post("/v1/feedback/rankings", json={**ranking, "instruction_version": "1"})
        assert ranked.status_code == 200, ranked.text
        stored = ann.get(f"/v1/chat/completions/{completion_id}").json()
    assert [choice["release"] for choice in stored["choices"]] == ["r2", "r2", "r1"]
    assert stored["system_fingerprint"] == "r2,r1"
    (event,) = (
        e for e in here.events("completions") if e.completion.completion_id == completion_id
    )
    digests = {name: here.registry.get(name).artifact for name in ("r1", "r2")}
    for output, by in zip(event.completion.outputs, ("r2", "r2", "r1"), strict=True):
        assert (output.release_id, output.release_digest) == (by, digests[by])
    assert event.completion.release_id == "r2"

    digest = build_dataset(here.log, here.registry.artifacts, RuleSettings(), "test")
    (row,) = pq.read_table(here.registry.artifacts.path(digest) / "rm.parquet").to_pylist()
    assert row["releases"] == ["r2", "r2", "r1"] and row["ranks"] == [1, 1, 0]


def test_nothing_is_kept_of_who_did_not_agree(here: House) -> None:
    before = len(here.events("completions"))
    answer = post(here, {**ASK, "candidates": BOTH}, user="bob")
    assert answer.headers["x-instructloop-recorded"] == "false"
    refused = post(here, {**ASK, "candidates": BOTH, "store": True}, user="bob")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "consent_required")
    assert len(here.events("completions")) == before


@pytest.mark.parametrize(
    ("changed", "status", "param"),
    [
        ({"candidates": None}, 400, "candidates"),
        ({"candidates": []}, 400, "candidates"),
        ({"candidates": [{"n": 1}]}, 400, "candidates.0.release"),
        ({"candidates": [{"release": "r1", "n": 0}]}, 400, "candidates.0.n"),
        ({"candidates": [{"release": "r1", "temperature": 1}]}, 400, "candidates.0.temperature"),
        ({"candidates": [{"release": "r1"}, {"release": "r1"}]}, 400, "candidates"),
        ({"candidates": [{"release": "r1", "n": 17}]}, 400, "n"),
        ({"candidates": [{"release": "r9"}]}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"stream": True}, 400, "stream"),
        ({"best_of": 2}, 400, "best_of"),
        ({"model": "tiny@r1"}, 400, "model"),
        ({"model": "another"}, 404, "model"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ({"temperature": 3}, 400, "temperature"),
    ],
)
def test_wrong_candidates_are_refused_by_field(
    here: House, changed: dict[str, Any], status: int, param: str
) -> None:
    answer = post(here, {**ASK, "candidates": BOTH, **changed}, user="bob")
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_tokens_of_all_candidates_count_against_the_key(here: House) -> None:
    with here.client("eve", tokens_per_minute=40) as eve:
        asked = {**ASK, "max_tokens": 8, "candidates": BOTH}
        answer = eve.post("/v1/feedback/candidates", json=asked)
        # 3 answers of 8 tokens each, and 5 read for each of two releases.
        # Taken in advance: 1 for the prompt, for each of the two, and all that may be written.
        assert answer.headers["x-ratelimit-remaining-tokens"] == "14"
        assert answer.json()["usage"]["total_tokens"] == 34
        again = eve.post("/v1/feedback/candidates", json=asked)
        assert again.status_code == 429 and json.loads(again.text)["error"]["type"] == "tokens"
