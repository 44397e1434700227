"""What a server counts, as Prometheus reads it: base units, no label that a client can choose freely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tc_deploy.manifest import variant_name
from tc_deploy.runtime.course import Tick
from tc_deploy.serving.engine import Engine, State, Watch

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TICK_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tc_deploy_requests",
            "Requests for pictures, by how they ended.",
            ["model", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "tc_deploy_request_seconds",
            "From a request's arrival to its answer, of those answered with pictures.",
            ["model", "quality"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pictures = Counter("tc_deploy_pictures", "Pictures sent.", ["model", "quality"], registry=self.registry)
        self._ticks = Histogram(
            "tc_deploy_tick_seconds",
            "Calls of the engine, with the solver and what is copied.",
            ["model", "variant"],
            buckets=_TICK_SECONDS,
            registry=self.registry,
        )
        self._rows = Counter(
            "tc_deploy_tick_slots", "Slots of these calls.", ["model", "variant", "used"], registry=self.registry
        )

    def watch(self, model: str) -> Watch:
        """What counts an engine's ticks."""

        def tick(tick: Tick, seconds: float, size: int) -> None:
            variant = variant_name(tick.kind.variant)
            self._ticks.labels(model, variant).observe(seconds)
            self._rows.labels(model, variant, "yes").inc(len(tick.places))
            self._rows.labels(model, variant, "no").inc(size - len(tick.places))

        return Watch(tick=tick)

    def observe(self, engines: Mapping[str, Engine]) -> None:
        """Show what engines are at whenever somebody asks."""
        self.registry.register(_Now(engines))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is true at the moment."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """As the registry wants it."""
        families = [
            GaugeMetricFamily("tc_deploy_ready", "Whether a bundle takes requests.", labels=["model"]),
            GaugeMetricFamily("tc_deploy_slots_busy", "Pictures that are being made.", labels=["model"]),
            GaugeMetricFamily("tc_deploy_queue_pictures", "Pictures that wait for a slot.", labels=["model"]),
        ]
        for name, engine in list(self._engines.items()):
            running, waiting = engine.samples
            for family, value in zip(families, (engine.state is State.READY, running, waiting), strict=True):
                family.add_metric([name], float(value))
        return families
