"""Who may come in: every route of the whole application, asked one by one."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from contracts.access import SCOPES, Scope
from tests.serving.house import House, house

# Without a key: the probes, the document, and the pages' own files.
OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/openapi.json")}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("routes")) as running:
        yield running


def routes(app: Any) -> set[tuple[str, str]]:
    """Method and path of every route, also of what is included and mounted; nothing by a list."""
    found: set[tuple[str, str]] = set()
    for route in app.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if getattr(inner, "routes", None):
            found |= routes(inner)
        elif getattr(route, "methods", None):
            found |= {(method, route.path) for method in route.methods - {"HEAD"}}
    return found


def path_of(path: str) -> str:
    for name in ("{model_id:path}", "{completion_id}", "{key_id}"):
        path = path.replace(name, "x")
    assert "{" not in path, path
    return path


def test_no_route_opens_without_a_key(here: House) -> None:
    asked = routes(here.app)
    documented = httpx.get(f"{here.url}/openapi.json").json()["paths"]
    told = {(method.upper(), path) for path, methods in documented.items() for method in methods}
    assert {("POST", "/v1/completions"), ("POST", "/v1/feedback/edits")} <= told
    assert told <= {(m, p.replace(":path}", "}")) for m, p in asked}
    for method, path in asked - OPEN:
        for headers in ({}, {"authorization": "Bearer il-wrong"}, {"authorization": "Basic eA=="}):
            answer = httpx.request(method, here.url + path_of(path), headers=headers, json={})
            assert answer.status_code == 401, (method, path, headers)
            assert answer.json()["error"]["code"] == "invalid_api_key"
    for method, path in OPEN:
        assert httpx.request(method, here.url + path).status_code == 200, path


def test_a_key_opens_what_its_scope_says(here: House) -> None:
    wanted: dict[str, set[Scope]] = {
        "/v1/models": {"complete"},
        "/v1/releases": {"complete"},
        "/v1/consent": {"feedback"},
        "/v1/chat/completions": {"feedback"},
        "/metrics": {"metrics", "admin"},
        "/v1/admin/keys": {"admin"},
        "/v1/admin/status": {"admin"},
        "/v1/admin/releases": {"admin"},
    }
    for scope in SCOPES:
        with here.client("eve", scope) as client:
            for path, opened_by in wanted.items():
                answer = client.get(path)
                assert (answer.status_code == 200) == (scope in opened_by), (scope, path)
                if answer.status_code != 200:
                    assert answer.status_code == 403
                    assert answer.json()["error"]["code"] == "missing_scope"


def test_an_admin_makes_and_revokes_keys(here: House) -> None:
    with here.client("root", "admin") as admin:
        ask = {"user_id": "kim", "scopes": ["complete"], "project": "p", "requests_per_minute": 9}
        made = admin.post("/v1/admin/keys", json=ask).json()
        assert made["key"].startswith("il-") and made["requests_per_minute"] == 9
        listed = admin.get("/v1/admin/keys").json()["data"]
        assert made["id"] in {key["id"] for key in listed}
        assert all("key" not in key for key in listed)
        headers = {"authorization": f"Bearer {made['key']}"}
        assert httpx.get(f"{here.url}/v1/models", headers=headers).status_code == 200
        assert admin.delete(f"/v1/admin/keys/{made['id']}").json()["revoked"]
        assert httpx.get(f"{here.url}/v1/models", headers=headers).status_code == 401
        assert admin.delete("/v1/admin/keys/none").status_code == 404
        wrong = admin.post("/v1/admin/keys", json={"user_id": "kim", "scopes": ["all"]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "scopes.0")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/completions", {"GET", "POST"}),  # one application has each
        ("OPTIONS", "/v1/chat/completions", {"GET", "POST"}),
        ("PATCH", "/v1/models/tiny", {"GET", "DELETE"}),
        ("GET", "/v1/admin/swap", {"POST"}),
        ("GET", "/v1/feedback/edits", {"POST"}),
        ("PUT", "/v1/completions/x", {"GET", "DELETE"}),
        ("POST", "/v1/completions/x", {"GET", "DELETE"}),  # told why
        ("POST", "/", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    here: House, method: str, path: str, allowed: set[str]
) -> None:
    with here.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_every_operation_documents_its_key_and_its_refusals(here: House) -> None:
    document = httpx.get(f"{here.url}/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["security"] == [{"key": []}], (method, path)
            assert operation["responses"].keys() == {"200", "4XX", "5XX"}, (method, path)
            names = {p["name"].lower() for p in operation.get("parameters", [])}
            assert "authorization" not in names, (method, path)


def test_the_document_shows_examples_of_feedback(here: House) -> None:
    document = httpx.get(f"{here.url}/openapi.json").json()
    for kind in ("Ranking", "Rating", "Edit", "Comment"):
        (example,) = document["components"]["schemas"][f"{kind}Request"]["examples"]
        assert example["completion_id"] in json.dumps(example)
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "best_of" in body["content"]["application/json"]["schema"]["properties"]
