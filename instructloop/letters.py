"""What the log could not read, as a metric."""

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from contracts.errors import LogUnavailable
from contracts.log import Log


class Letters(Collector):
    """A log's dead letters, counted when it is asked for: whoever met them, on any machine."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "instructloop_dead_letters",
            "Records that are no event of their topic, until they are brought back",
            labels=["topic", "reason"],
        )
        try:
            letters = self._log.dead_letters()
        except LogUnavailable:  # then no number is better than a wrong one
            return []
        for place, count in Counter((letter.topic, letter.reason) for letter in letters).items():
            family.add_metric(place, count)
        return [family]
