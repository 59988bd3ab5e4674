"""Metrics: what this server counts, for Prometheus; the engine's own stand beside it."""

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.limits import Limiter
from serving.recorder import Recorder
from serving.swap import WeightSwapper

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self, swapper: WeightSwapper, recorder: Recorder, limiter: Limiter) -> None:
        own = CollectorRegistry()
        self._registry = own
        self.requests = Counter(
            "instructloop_requests",
            "Requests answered",
            ["method", "route", "status", "release"],
            registry=own,
        )
        self.seconds = Histogram(
            "instructloop_request_seconds",
            "From a request's first byte to its answer's last",
            ["route"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=own,
        )
        self.tokens = Counter(
            "instructloop_tokens", "Tokens read and written", ["release", "type"], registry=own
        )
        self.recorded = Counter(
            "instructloop_completions_recorded",
            "Completions handed to the recorder under a consent",
            ["release"],
            registry=own,
        )
        self.consent_refusals = Counter(
            "instructloop_consent_refusals",
            "Completions of which nothing is kept: no consent, or it could not be asked",
            ["reason"],
            registry=own,
        )
        self.limits = Counter(
            "instructloop_limits_hit", "Requests that a limit stopped", ["limit"], registry=own
        )
        self.filtered = Counter(
            "instructloop_answers_filtered",
            "Answers that the content filter cut",
            ["release"],
            registry=own,
        )
        own.register(_Followed(swapper, recorder, limiter))

    def add(self, collector: Collector) -> None:
        """More to tell, of what this package does not know."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """Everything in Prometheus's text format: ours, then the process's and the engine's."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)


class _Followed(Collector):
    """What the parts count themselves, read when it is asked for."""

    def __init__(self, swapper: WeightSwapper, recorder: Recorder, limiter: Limiter) -> None:
        self._swapper, self._recorder, self._limiter = swapper, recorder, limiter

    def collect(self) -> Iterable[Metric]:
        changes = list(self._swapper.changes)
        swaps = CounterMetricFamily(
            "instructloop_swaps",
            "Releases that were tried: swapped in, loaded beside, refused, rolled back",
            labels=["release", "outcome", "source"],
        )
        tried = Tally((c.release, c.outcome, c.source) for c in changes)
        for labels, count in tried.items():
            swaps.add_metric(labels, count)
        pause = CounterMetricFamily(
            "instructloop_swap_pause_seconds", "Time in which the gate was closed for an exchange"
        )
        pause.add_metric([], sum(change.pause_ms for change in changes) / 1000)
        serving = GaugeMetricFamily(
            "instructloop_release_serving", "1 for the release that answers", labels=["release"]
        )
        if self._swapper.serving is not None:
            serving.add_metric([self._swapper.serving.id], 1)
        lost = CounterMetricFamily(
            "instructloop_completions_lost", "Completions that were to be recorded and are not"
        )
        lost.add_metric([], self._recorder.lost)
        unlimited = CounterMetricFamily(
            "instructloop_requests_unlimited", "Requests let through while limits had no storage"
        )
        unlimited.add_metric([], self._limiter.unlimited)
        return [swaps, pause, serving, lost, unlimited]
