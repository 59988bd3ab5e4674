import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from contracts.access import Principal
from contracts.errors import Unauthenticated
from contracts.log import Log
from contracts.v1 import events_pb2 as pb
from feedback import notice
from feedback.app import create_app
from feedback.consent import ConsentLedger
from feedback.log import open_log
from tests.feedback.samples import completion, consent

ANN = {"Authorization": "Bearer il-ann"}
BOB = {"Authorization": "Bearer il-bob"}
PRODUCTION = {"Authorization": "Bearer il-production-ann"}
JUDGEMENT = {"completion_id": "c1", "groups": [[0], [2, 1]], "instruction_version": "1"}


def authenticate(header: str | None) -> Principal:
    """The key il-NAME belongs to NAME, il-production-NAME too."""
    name = (header or "").removeprefix("Bearer il-")
    if name.removeprefix("production-") not in ("ann", "bob"):
        raise Unauthenticated("no such key")
    return Principal(
        name.removeprefix("production-"), "key", production=name.startswith("production-")
    )


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    yield log
    log.close()


@pytest.fixture
def client(log: Log) -> TestClient:
    app = create_app(sink=log, source=log, authenticate=authenticate, consent=ConsentLedger(log))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def opted_in(log: Log) -> None:
    log.append([consent("ann"), consent("bob"), completion("ann", "c1")])


def rankings(log: Log) -> list[pb.Event]:
    return [record.event for record in log.read("rankings", 0, 0, 100)]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/consent"), ("PUT", "/v1/consent"), ("POST", "/v1/feedback/rankings")],
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer il-eve"}])
def test_every_api_route_needs_a_key(
    client: TestClient, log: Log, method: str, path: str, headers: dict[str, str]
) -> None:
    body = {"granted": True, "notice_version": "1"} if "consent" in path else JUDGEMENT
    response = client.request(method, path, headers=headers, json=body)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"] == {
        "message": "no such key",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert log.ends("consents")[0] == log.ends("rankings")[0] == 0


def test_a_person_agrees_and_withdraws(client: TestClient, log: Log) -> None:
    shown = client.get("/v1/consent", headers=ANN).json()
    assert shown == {
        "object": "consent",
        "user_id": "ann",
        "granted": False,
        "notice_version": None,
        "purposes": [],
        "notice": {"version": "1", "text": notice.CURRENT.text},
    }
    agreed = client.put("/v1/consent", headers=ANN, json={"granted": True, "notice_version": "1"})
    everything = ["training", "evaluation", "reading"]
    assert agreed.json() == shown | {"granted": True, "notice_version": "1", "purposes": everything}
    assert client.get("/v1/consent", headers=ANN).json() == agreed.json()
    assert client.get("/v1/consent", headers=BOB).json()["granted"] is False
    left = client.put("/v1/consent", headers=ANN, json={"granted": False, "notice_version": "1"})
    assert left.json() == client.get("/v1/consent", headers=ANN).json() == shown
    assert [r.event.consent.state for r in log.read("consents", 0, 0, 9)] == [1, 2]


def test_purposes_can_be_granted_and_withdrawn_one_by_one(client: TestClient, log: Log) -> None:
    some = {"granted": True, "notice_version": "1", "purposes": ["training", "reading"]}
    assert client.put("/v1/consent", headers=ANN, json=some).json()["purposes"] == some["purposes"]
    less = {"granted": False, "notice_version": "1", "purposes": ["training"]}
    left = client.put("/v1/consent", headers=ANN, json=less).json()
    assert (left["granted"], left["purposes"]) == (False, ["reading"])
    client.put("/v1/consent", headers=ANN, json=some | {"purposes": ["reading"]})
    assert log.ends("consents")[0] == 2


def test_a_withdrawal_is_written_whatever_seems_to_be_granted(client: TestClient, log: Log) -> None:
    """Another server may have taken an agreement that is not known here yet."""
    nothing = {"granted": False, "notice_version": "1"}
    assert client.put("/v1/consent", headers=ANN, json=nothing).json()["granted"] is False
    (record,) = log.read("consents", 0, 0, 9)
    assert record.event.consent.state == pb.CONSENT_STATE_WITHDRAWN


def test_a_person_learns_what_is_held_and_what_was_made_of_it(client: TestClient, log: Log) -> None:
    log.append([consent("ann"), consent("bob"), completion("ann", "c1", "mine")])
    log.append([completion("bob", "c2", "not hers")])
    report = client.get("/v1/consent/report", headers=ANN).json()
    assert (report["user_id"], report["datasets"], report["served"]) == ("ann", [], None)
    held = client.get("/v1/consent/export", headers=ANN).json()
    assert [e["completion"]["prompt"]["text"] for e in held["events"]["completions"]] == ["mine"]
    assert len(held["events"]["consents"]) == 1
    assert "not hers" not in str(held)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"granted": True, "notice_version": "1", "erase": True}, "erase"),
        (
            {"granted": False, "notice_version": "1", "erase": True, "purposes": ["reading"]},
            "erase",
        ),
        ({"granted": True, "notice_version": "1", "purposes": ["fun"]}, "purposes.0"),
    ],
)
def test_a_consent_that_makes_no_sense_is_refused(
    client: TestClient, log: Log, body: dict[str, object], param: str
) -> None:
    response = client.put("/v1/consent", headers=ANN, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert log.ends("consents")[0] == 0


def test_agreeing_to_the_same_again_writes_nothing(client: TestClient, log: Log) -> None:
    for _ in range(2):
        client.put("/v1/consent", headers=ANN, json={"granted": True, "notice_version": "1"})
    assert log.ends("consents")[0] == 1


def test_only_the_current_notice_can_be_agreed_to(client: TestClient, log: Log) -> None:
    body = {"granted": True, "notice_version": "0"}
    response = client.put("/v1/consent", headers=ANN, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "notice_version"
    assert log.ends("consents")[0] == 0


@pytest.mark.usefixtures("opted_in")
def test_a_ranking_is_in_the_log_when_the_answer_comes(client: TestClient, log: Log) -> None:
    extra = {"seconds_spent": 2.5, "metadata": {"why": "shorter"}}
    response = client.post(
        "/v1/feedback/rankings",
        headers=ANN | {"x-instructloop-source": "playground"},
        json=JUDGEMENT | extra,
    )
    assert response.status_code == 200
    (event,) = rankings(log)
    assert response.json() == {
        "object": "ranking",
        "id": event.id,
        "completion_id": "c1",
        "groups": [[0], [2, 1]],
    }
    assert event.user_id == "ann"
    assert event.ranking == pb.Ranking(
        completion_id="c1",
        groups=[pb.RankGroup(outputs=[0]), pb.RankGroup(outputs=[2, 1])],
        instruction_version="1",
        seconds_spent=2.5,
        source=pb.SOURCE_PLAYGROUND,
        notice_version="1",
        metadata={"why": "shorter"},
    )


@pytest.mark.usefixtures("opted_in")
def test_a_completion_that_was_logged_later_is_found(client: TestClient, log: Log) -> None:
    later = JUDGEMENT | {"completion_id": "c2"}
    assert client.post("/v1/feedback/rankings", headers=ANN, json=later).status_code == 404
    log.append([completion("ann", "c2")])
    assert client.post("/v1/feedback/rankings", headers=ANN, json=later).status_code == 200


@pytest.mark.usefixtures("opted_in")
def test_another_persons_completion_looks_like_none(client: TestClient, log: Log) -> None:
    others = client.post("/v1/feedback/rankings", headers=BOB, json=JUDGEMENT)
    nobodys = client.post(
        "/v1/feedback/rankings", headers=BOB, json=JUDGEMENT | {"completion_id": "c9"}
    )
    assert others.status_code == nobodys.status_code == 404
    assert (
        others.json()["error"]["message"].replace("c1", "c9") == nobodys.json()["error"]["message"]
    )
    assert rankings(log) == []


@pytest.mark.parametrize("headers", [ANN, PRODUCTION])
def test_without_consent_nothing_is_written(
    client: TestClient, log: Log, headers: dict[str, str]
) -> None:
    log.append([completion("ann", "c1")])
    if headers is PRODUCTION:
        log.append([consent("ann")])
    response = client.post("/v1/feedback/rankings", headers=headers, json=JUDGEMENT)
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")
    assert rankings(log) == []


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"groups": []}, "groups"),
        ({"groups": [[0]]}, "groups"),
        ({"groups": [[0], []]}, "groups"),
        ({"groups": [[0], [0]]}, "groups"),
        ({"groups": [[0], [3]]}, "groups"),
        ({"groups": [[0], [-1]]}, "groups.1.0"),
        ({"groups": [[0], [True]]}, "groups.1.0"),
        ({"groups": "01"}, "groups"),
        ({"completion_id": ""}, "completion_id"),
        ({"completion_id": None}, "completion_id"),
        ({"instruction_version": 1}, "instruction_version"),
        ({"seconds_spent": -1}, "seconds_spent"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"rank": 1}, "rank"),
    ],
)
def test_a_malformed_ranking_names_the_field(
    client: TestClient, log: Log, change: dict[str, object], param: str
) -> None:
    response = client.post("/v1/feedback/rankings", headers=ANN, json=JUDGEMENT | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert rankings(log) == []


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [["0"], [1]]}, "groups.0.0: expected a valid integer, got 'str'"),
        ({"groups": [[0]] * 10}, "groups: expected at most 9 items, got 10"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k: expected at most 512 characters, got 513"),
        ({"seconds_spent": -1}, "seconds_spent: expected greater than or equal to 0, got -1"),
        ({"rank": 1}, "rank: expected only arguments that exist, got 'an unrecognized one'"),
    ],
)
def test_a_malformed_ranking_says_what_was_expected_and_what_came(
    client: TestClient, change: dict[str, object], message: str
) -> None:
    response = client.post("/v1/feedback/rankings", headers=ANN, json=JUDGEMENT | change)
    assert response.json()["error"]["message"] == message


@pytest.mark.usefixtures("opted_in")
def test_a_body_of_another_type_and_a_header_are_named(client: TestClient) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/v1/feedback/rankings", headers=ANN | form, content="{}")
    expected = "body: expected a JSON object, sent as application/json, got 'bytes'"
    assert answer.json()["error"]["message"] == expected
    page = {"X-Instructloop-Source": "other"}
    answer = client.post("/v1/feedback/rankings", headers=ANN | page, json=JUDGEMENT)
    assert answer.json()["error"]["param"] == "X-Instructloop-Source"


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize("body", ["{", '{"metadata": {"k": "\\ud800"}}', "[]", ""])
def test_what_is_no_judgement_at_all_is_400(client: TestClient, log: Log, body: str) -> None:
    headers = ANN | {"Content-Type": "application/json"}
    response = client.post("/v1/feedback/rankings", headers=headers, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert rankings(log) == []


@pytest.mark.usefixtures("opted_in")
def test_the_same_key_counts_once(client: TestClient, log: Log) -> None:
    headers = ANN | {"Idempotency-Key": "k1"}
    first = client.post("/v1/feedback/rankings", headers=headers, json=JUDGEMENT)
    again = client.post("/v1/feedback/rankings", headers=headers, json=JUDGEMENT)
    assert (first.status_code, again.json()) == (200, first.json())
    assert len(rankings(log)) == 1
    other = client.post(
        "/v1/feedback/rankings", headers=headers, json=JUDGEMENT | {"groups": [[1], [0]]}
    )
    assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert len(rankings(log)) == 1


@pytest.mark.usefixtures("opted_in")
def test_two_people_may_use_the_same_key(client: TestClient, log: Log) -> None:
    log.append([completion("bob", "c2")])
    key = {"Idempotency-Key": "k1"}
    client.post("/v1/feedback/rankings", headers=ANN | key, json=JUDGEMENT)
    client.post(
        "/v1/feedback/rankings", headers=BOB | key, json=JUDGEMENT | {"completion_id": "c2"}
    )
    assert [event.user_id for event in rankings(log)] == ["ann", "bob"]


@pytest.mark.usefixtures("opted_in")
def test_different_rankings_under_one_key_at_once_are_not_both_kept(
    client: TestClient, log: Log
) -> None:
    statuses: list[int] = []

    def send(groups: list[list[int]]) -> None:
        response = client.post(
            "/v1/feedback/rankings",
            headers=ANN | {"Idempotency-Key": "k1"},
            json=JUDGEMENT | {"groups": groups},
        )
        statuses.append(response.status_code)

    threads = [threading.Thread(target=send, args=([[i], [1 - i]],)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 400]
    assert len(rankings(log)) == 1


@pytest.mark.usefixtures("opted_in")
def test_who_withdraws_can_rank_no_more(client: TestClient, log: Log) -> None:
    client.put("/v1/consent", headers=ANN, json={"granted": False, "notice_version": "1"})
    assert client.post("/v1/feedback/rankings", headers=ANN, json=JUDGEMENT).status_code == 403
    assert rankings(log) == []


def test_the_pages_come_without_a_key_and_under_a_strict_policy(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/../app.py", 404),
        ("GET", "/..%2fapp.py", 404),
        ("POST", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ],
)
def test_there_is_nothing_else(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_it_works_below_another_app_on_the_same_port(client: TestClient) -> None:
    outer = FastAPI()
    outer.get("/v1/models")(lambda: {"object": "list"})
    outer.mount("/", client.app)
    both = TestClient(outer)
    assert both.get("/v1/models").json() == {"object": "list"}
    assert both.get("/v1/consent", headers=ANN).json()["user_id"] == "ann"
    assert both.get("/v1/consent").json()["error"]["code"] == "invalid_api_key"
    assert both.get("/").headers["content-type"].startswith("text/html")


def test_a_log_that_fails_is_a_500_that_tells_nothing(client: TestClient, log: Log) -> None:
    log.close()
    response = client.put("/v1/consent", headers=ANN, json={"granted": True, "notice_version": "1"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "sqlite" not in response.text.lower()


SAID: dict[str, dict[str, Any]] = {
    "ratings": {"completion_id": "c1", "output": 1, "score": 6},
    "edits": {"completion_id": "c1", "output": 0, "text": "better"},
    "comments": {"completion_id": "c1", "text": "too short"},
}


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize("kind", SAID)
def test_each_kind_of_feedback_is_an_event(client: TestClient, log: Log, kind: str) -> None:
    headers = ANN | {"Idempotency-Key": "k1", "x-instructloop-source": "playground"}
    path = f"/v1/feedback/{kind}"
    first, again = (client.post(path, headers=headers, json=SAID[kind]) for _ in range(2))
    assert first.status_code == 200 and first.json() == again.json()
    (record,) = log.read(kind, 0, 0, 10)
    assert record.event.id == first.json()["id"] and record.event.user_id == "ann"
    body = getattr(record.event, kind.removesuffix("s"))
    assert body.notice_version == "1" and body.source == pb.SOURCE_PLAYGROUND
    for name, value in SAID[kind].items():
        assert getattr(body, name) == value
    other = client.post(path, headers=headers, json=SAID[kind] | {"metadata": {"a": "b"}})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")
    for who, completion_id in ((BOB, "c1"), (ANN, "c9")):
        said = SAID[kind] | {"completion_id": completion_id}
        missing = client.post(path, headers=who, json=said)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert client.post(path, headers=PRODUCTION, json=SAID[kind]).status_code == 403


@pytest.mark.usefixtures("opted_in")
@pytest.mark.parametrize(
    ("kind", "change", "param"),
    [
        ("ratings", {"score": 8}, "score"),
        ("ratings", {"score": 0}, "score"),
        ("ratings", {"score": "6"}, "score"),
        ("ratings", {"score": 6.5}, "score"),
        ("ratings", {"output": True}, "output"),
        ("ratings", {"output": 3}, "output"),
        ("ratings", {"output": -1}, "output"),
        ("edits", {"text": " "}, "text"),
        ("edits", {"output": None}, "output"),
        ("comments", {"output": 3}, "output"),
        ("comments", {"more": 1}, "more"),
    ],
)
def test_malformed_feedback_names_the_field(
    client: TestClient, log: Log, kind: str, change: dict[str, object], param: str
) -> None:
    answer = client.post(f"/v1/feedback/{kind}", headers=ANN, json=SAID[kind] | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert log.ends(kind)[0] == 0


@pytest.mark.usefixtures("opted_in")
def test_a_page_after_what_is_not_in_the_list_is_not_found(client: TestClient) -> None:
    assert client.get("/v1/completions", headers=ANN, params={"after": "c1"}).json()["data"] == []
    answer = client.get("/v1/completions", headers=ANN, params={"after": "c9"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after")


@pytest.mark.usefixtures("opted_in")
def test_a_number_without_a_fraction_is_whole(client: TestClient) -> None:
    answer = client.post("/v1/feedback/ratings", headers=ANN, json=SAID["ratings"] | {"score": 6.0})
    assert answer.json()["score"] == 6


@pytest.mark.usefixtures("opted_in")
def test_what_was_taken_back_can_be_judged_no_more(client: TestClient, log: Log) -> None:
    assert client.delete("/v1/completions/c1", headers=BOB).status_code == 404
    assert client.delete("/v1/completions/c1", headers=ANN).json()["deleted"] is True
    assert client.delete("/v1/completions/c1", headers=ANN).status_code == 404
    assert log.ends("withdrawals")[0] == 1
    assert client.post("/v1/feedback/rankings", headers=ANN, json=JUDGEMENT).status_code == 404
    assert client.get("/v1/completions", headers=ANN).json()["data"] == []
