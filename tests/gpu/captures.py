"""Whether captured runs compute what launched ones do, bit for bit, and what that is worth."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_deploy.backends.base import BoundGraph, Device, Graph
from tc_deploy.backends.load import load_target
from tc_deploy.bench.clock import Clock, step_by_step
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import latency_of, ratio_of
from tc_deploy.manifest import read_manifest
from tc_deploy.runtime.pipeline import Pipeline

SEED = 0


class Launched:
    """A bound graph that a device does not take for its own, so it is launched by itself and never captured."""

    def __init__(self, graph: BoundGraph) -> None:
        self.run = graph.run


def captured_and_launched(
    bundle: Path, backend: str, batch: int, rounds: int, engines: tuple[Device, Mapping[str, Graph]] | None = None
) -> dict[str, Any]:
    """The plan's run on the same engines: as one CUDA graph, as one per step, and every engine launched by itself."""
    engines = engines or load_target(bundle, read_manifest(bundle), backend)
    captured = Pipeline(bundle, backend, batch_size=batch, engines=engines)
    launched = Pipeline(
        bundle, backend, batch_size=batch, engines=engines, watch=lambda name, graph, output: Launched(graph)
    )
    request = {**captured.placeholders(batch), "seed": SEED}
    ways = {
        "launched": functools.partial(launched, **request, on_step=step_by_step),
        "graph_per_step": functools.partial(captured, **request, on_step=step_by_step),
        "one_graph": functools.partial(captured, **request),
    }
    # The first run of each captures, and is launched for it; the second is what later ones are.
    latents = {way: [run().latents for _ in range(2)][-1] for way, run in ways.items()}
    clock = Clock()
    timed = {way: functools.partial(clock.timed, run, graphs=False) for way, run in ways.items()}
    times_ms = {way: [run.wall_ms for run in runs] for way, runs in interleaved(timed, rounds).items()}
    return {
        "batch_size": batch,
        "equal_to_launched": {way: bool(np.array_equal(made, latents["launched"])) for way, made in latents.items()},
        "latency": {way: latency_of(times) for way, times in times_ms.items()},
        "ratio_to_launched": {way: ratio_of(times, times_ms["launched"]) for way, times in times_ms.items()},
    }
