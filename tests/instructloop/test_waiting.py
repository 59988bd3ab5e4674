from pathlib import Path

from prometheus_client import CollectorRegistry

from contracts.events import Stamper
from contracts.v1 import events_pb2 as pb
from feedback.log.spool import Spool
from instructloop.waiting import Waiting

LIMIT = 1 << 20


def test_what_waits_is_told_until_it_is_forwarded(tmp_path: Path) -> None:
    now = [100.0]
    spool = Spool(tmp_path / "spool.db", LIMIT, clock=lambda: now[0])
    told = CollectorRegistry()
    told.register(Waiting(spool))
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version="1")
    spool.append([Stamper("test").event("ann", granted) for _ in range(3)])
    now[0] = 107.0
    assert told.get_sample_value("instructloop_spool_events") == 3
    assert told.get_sample_value("instructloop_spool_oldest_seconds") == 7
    assert 0 < (told.get_sample_value("instructloop_spool_share") or 0) < 1
    spool.forget(spool.waiting(0, 10))
    assert told.get_sample_value("instructloop_spool_events") == 0
    assert told.get_sample_value("instructloop_spool_oldest_seconds") == 0
    spool.close()
