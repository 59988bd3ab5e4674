"""One process on a Kafka that dies: what a person sees of it."""

import time
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from demo.broker import Cluster
from feedback import notice
from feedback.log.address import KafkaSettings, parse
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool, SpoolSettings
from feedback.log.spooled import SpooledLog
from feedback.vault import open_events
from instructloop.serve import Place, create_app
from serving.access import KeyStore
from serving.settings import Settings

pytestmark = pytest.mark.kafka


def test_people_withdraw_while_the_broker_is_away(
    kafka_parts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "3")
    cluster = Cluster(tmp_path / "kafka").start()
    url = f"kafka://{cluster.bootstrap}/served?replication=1"
    place = Place(log=url, registry=tmp_path / "registry", keys=tmp_path / "keys.db")
    key, _ = KeyStore(place.keys).create("ann")
    stranger = {"authorization": f"Bearer {KeyStore(place.keys).create('sue')[0]}"}
    spool = SpoolSettings(path=tmp_path / "spool.db")
    try:
        with closing(open_events(url, tmp_path / "vault.db", spool)) as events:
            assert isinstance(events.inner, SpooledLog)
            waiting = events.inner.spool
            client = TestClient(
                create_app(place, Settings(), events, spool),
                headers={"authorization": f"Bearer {key}"},
            )

            def agree(granted: bool) -> None:
                body = {"granted": granted, "notice_version": notice.CURRENT.version}
                assert client.put("/v1/consent", json=body).json()["granted"] is granted

            def agreed() -> bool:
                return bool(client.get("/v1/consent").json()["granted"])

            agree(True)
            wait_until_forwarded(waiting)
            assert agreed()
            cluster.kill(cluster.nodes[0])
            assert agreed()
            # Nobody asked about her since the start; her word counts all the same.
            assert client.get("/v1/consent", headers=stranger).status_code == 503
            body = {"granted": False, "notice_version": notice.CURRENT.version}
            answer = client.put("/v1/consent", headers=stranger, json=body)
            assert answer.json()["granted"] is False
            agree(False)
            assert not agreed()
            ranking = {"completion_id": "x", "groups": [[0], [1]], "instruction_version": "1"}
            refused = client.post("/v1/feedback/rankings", json=ranking)
            assert refused.status_code == 403  # the withdrawal counts here as well
            agree(True)
            refused = client.post("/v1/feedback/rankings", json=ranking)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "log_unavailable"
            agree(False)
            cluster.restart(cluster.nodes[0])
            wait_until_forwarded(waiting)
        log = KafkaLog(parse(url), KafkaSettings(timeout_s=30))
        said_by = {"ann": list[int](), "sue": list[int]()}
        for record in follow(log, "consents", {}):
            said_by[record.event.user_id].append(record.event.consent.state)
        log.close()
        granted, withdrawn = pb.CONSENT_STATE_GRANTED, pb.CONSENT_STATE_WITHDRAWN
        assert said_by == {"ann": [granted, withdrawn, granted, withdrawn], "sue": [withdrawn]}
    finally:
        cluster.stop()


def wait_until_forwarded(spool: Spool) -> None:
    deadline = time.monotonic() + 60
    while spool.oldest() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
