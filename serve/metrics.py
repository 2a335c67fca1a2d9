"""Counters and histograms of a server, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .pool import EnginePool

FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class EngineCollector:
    """A collector of what engines know themselves, read when somebody asks."""

    def __init__(self, pool: EnginePool):
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield the state of every engine that is loaded."""
        loads = {
            name: GaugeMetricFamily(f"visistage_{name}", text, labels=["model"])
            for name, text in (
                ("running", "Questions that are being answered."),
                ("waiting", "Questions that wait for a lane."),
                ("lanes", "Answers that are written at once."),
            )
        }
        labels = ["model", "cache"]
        nbytes = GaugeMetricFamily(
            "visistage_image_cache_bytes", "Bytes kept of images.", labels=labels
        )
        hits = CounterMetricFamily(
            "visistage_image_cache_hits", "Images that were known.", labels=labels
        )
        for model, engine in self._pool.loaded().items():
            for name, value in engine.load().items():
                loads[name].add_metric([model], value)
            for name, cache in (("stages", engine.prefixes), ("encoder", engine.visual_rows)):
                nbytes.add_metric([model, name], cache.nbytes)
                hits.add_metric([model, name], cache.hits)
        yield from (*loads.values(), nbytes, hits)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self, pool: EnginePool):
        self._registry = own = CollectorRegistry()
        own.register(EngineCollector(pool))  # type: ignore[arg-type]
        self.requests = Counter(
            "visistage_requests", "Requests, answered or not.", ["route", "status"], registry=own
        )
        self.tokens = Counter(
            "visistage_tokens", "Tokens of finished answers.", ["model", "kind"], registry=own
        )
        self.cancelled = Counter(
            "visistage_cancelled", "Answers whose callers went away.", ["model"], registry=own
        )
        self.first = Histogram(
            "visistage_first_token_seconds",
            "From the last byte of a request to the first piece of its answer.",
            ["model"],
            buckets=FIRST_SECONDS,
            registry=own,
        )
        self.gap = Histogram(
            "visistage_token_gap_seconds",
            "Between two pieces of an answer, each a token or some.",
            ["model"],
            buckets=GAP_SECONDS,
            registry=own,
        )

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self._registry)
