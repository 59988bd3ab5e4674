"""What the log could not read, as a metric."""

import threading
from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from contracts.errors import LogUnavailable
from contracts.log import Log


class Letters(Collector):
    """A log's dead letters, whoever met them, on any machine.

    A scrape has them counted, aside, and gets the count of the one before: a log that does not
    answer holds up none of the other metrics, of which some are about just that.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._counts: Counter[tuple[str, str]] = Counter()
        self._counting: threading.Thread | None = None

    def count(self) -> threading.Thread:
        """Begin to count anew, unless that is going on."""
        if self._counting is None or not self._counting.is_alive():
            self._counting = threading.Thread(target=self._count, name="dead-letters", daemon=True)
            self._counting.start()
        return self._counting

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "instructloop_dead_letters",
            "Records that are no event of their topic, until they are brought back",
            labels=["topic", "reason"],
        )
        for place, count in self._counts.items():
            family.add_metric(place, count)
        self.count()
        return [family]

    def _count(self) -> None:
        try:
            letters = self._log.dead_letters()
        except LogUnavailable:  # then what was known is
            return
        self._counts = Counter((letter.topic, letter.reason) for letter in letters)
