"""Prometheus metrics of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter("unclip_requests", "Answered requests", labels, registry=registry)
        self.latency = Histogram(
            "unclip_request_seconds", "Time to the end of a response", ("route",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_images = Gauge("unclip_queue_images", "Images that wait", registry=registry)
        self.queue_seconds = Histogram(
            "unclip_queue_seconds", "Time in the queue", buckets=SECONDS, registry=registry
        )
        self.batch_images = Histogram(
            "unclip_batch_images", "Images of a call", buckets=BATCHES, registry=registry
        )
        self.stage_seconds = Counter(
            "unclip_stage_seconds", "Time of sampling", ("stage",), registry=registry
        )
        self.images = Counter(
            "unclip_images", "Generated images", ("model", "operation"), registry=registry
        )
        self.cancellations = Counter("unclip_cancellations", "Cancelled jobs", registry=registry)
        self.rejections = Counter(
            "unclip_rejections", "Jobs that were not started", ("reason",), registry=registry
        )
        self.retries = Counter("unclip_batch_retries", "Batches run one by one", registry=registry)
        self.out_of_memory = Counter("unclip_out_of_memory", "Halved batches", registry=registry)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
