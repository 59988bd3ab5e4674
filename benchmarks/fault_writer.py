"""The process that fault runs kill: python -m benchmarks.fault_writer URL SPOOL ACKNOWLEDGED."""

import signal
import sys
import threading
import time
from pathlib import Path

from contracts.events import Stamper
from contracts.v1 import events_pb2 as pb
from feedback.log.address import KafkaSettings, parse
from feedback.log.kafka import KafkaLog
from feedback.log.spool import Spool
from feedback.log.spooled import SpooledLog

BATCH = 20
# Below what a starved machine forwards, so that a run ends with an empty spool.
PAUSE_S = 0.02


def main() -> None:
    url, path, said = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    spool = Spool(Path(path), 4 << 30)
    log = SpooledLog(KafkaLog(parse(url), KafkaSettings(timeout_s=5)), spool)
    stamp, count = Stamper("faults"), 0
    granted = pb.Consent(state=pb.CONSENT_STATE_GRANTED, notice_version="1")
    with Path(said).open("a", encoding="ascii") as acknowledged:
        while not stop.wait(PAUSE_S):
            events = [stamp.event(f"user-{(count + i) % 97}", granted) for i in range(BATCH)]
            log.append(events)
            acknowledged.write("".join(f"{event.id}\n" for event in events))
            acknowledged.flush()
            count += BATCH
    while spool.oldest() is not None:
        time.sleep(0.1)
    log.close()


if __name__ == "__main__":
    main()
