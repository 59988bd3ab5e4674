"""What waits in a server's spool, as metrics."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feedback.log.spool import Spool


class Waiting(Collector):
    """The status of a spool, looked at when it is asked for."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterable[Metric]:
        status = self._spool.status()
        return [
            GaugeMetricFamily(
                "instructloop_spool_events", "Events that wait for the log", value=status.depth
            ),
            GaugeMetricFamily(
                "instructloop_spool_oldest_seconds",
                "Since the oldest of them came",
                value=status.age_s,
            ),
            GaugeMetricFamily(
                "instructloop_spool_share", "Share of its limit on disk", value=status.share
            ),
        ]
