"""Figures of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from wavelet_lm.serving.service import Service

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Figures:
    """What a service has done and holds."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service):
        self._service = service
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "wavelet_lm_requests",
            "Requests by path and status",
            ["path", "status"],
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "wavelet_lm_request_seconds",
            "Seconds until a request is answered, of a stream until it begins",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "wavelet_lm_first_token_seconds",
            "Seconds from a prompt to the first token",
            buckets=SECONDS,
            registry=self._registry,
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; path: as it is declared, not as it was asked for."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count a text's first token."""
        self._first_token.observe(seconds)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The figures that are the scheduler's own."""
        service, scheduler = self._service, self._service.scheduler
        done = scheduler.figures
        tokens = CounterMetricFamily(
            "wavelet_lm_tokens",
            "Tokens read, found in the state cache, and written",
            labels=["kind"],
        )
        for kind in ("read", "cached", "written"):
            tokens.add_metric([kind], done[kind])
        yield tokens
        for name, words, value in (
            ("steps", "Steps in which every text grew by a token", done["steps"]),
            ("step_rows", "Texts of all these steps", done["rows"]),
            ("step_seconds", "Seconds of all these steps", done["seconds"]),
        ):
            yield CounterMetricFamily(f"wavelet_lm_{name}", words, value=value)
        for name, words, value in (
            ("streams", "Texts that are waited for", service.n_streams),
            ("streams_reading", "Prompts that are being read", scheduler.n_reading),
            ("streams_writing", "Texts that are being written", scheduler.n_writing),
            ("cache_states", "States in the cache", len(scheduler.cache)),
            ("cache_bytes", "Bytes of the states in the cache", scheduler.cache.n_bytes),
            ("saved_states", "States with names", len(service.states)),
            ("state_bytes", "Bytes of one state", scheduler.layout.n_bytes),
        ):
            yield GaugeMetricFamily(f"wavelet_lm_{name}", words, value=value)
