from pathlib import Path

import httpx

from serving.settings import Settings
from tests.serving.house import house


def test_no_route_reads_more_than_a_body_may_have_not_even_without_a_key(tmp_path: Path) -> None:
    settings = Settings(release_poll_s=0.02, max_body_bytes=1024, push="tcp")
    with house(tmp_path, settings) as here, httpx.Client(base_url=here.url) as client:
        for method, path in BODIES:
            most = client.request(method, path, content=b" " * 1024, headers=JSON)
            more = client.request(method, path, content=b" " * 1025, headers=JSON)
            assert most.status_code != 413 and more.status_code == 413, path
            assert more.json()["error"]["type"] == "invalid_request_error"
        with here.client() as ann:
            assert ann.post("/v1/completions", content=b" " * 1025).status_code == 413
        offer = client.post("/v1/admin/push", content=b" " * 1025, headers=JSON)
        assert offer.status_code != 413  # an offer grows with the model


JSON = {"content-type": "application/json"}
BODIES = [
    ("PUT", "/v1/consent"),
    ("POST", "/v1/feedback/rankings"),
    ("POST", "/v1/feedback/comments"),
    ("POST", "/v1/admin/keys"),
    ("POST", "/v1/admin/swap"),
]
