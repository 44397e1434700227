"""Two bundles' runs in turn: how everything that a search times on engines is timed.

In: the full run's bundle and another. Out: their times, round by round. Never: makes a figure of them.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from tc_deploy.bench.clock import Clock
from tc_deploy.bench.interleave import interleaved
from tc_deploy.runtime.pipeline import Pipeline


def times_in_turn(
    reference: Path, bundle: Path, backend: str, batch_size: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Run both, once to warm up and then in rounds.

    Args:
        reference: engines of the model's own run, without caches.
        bundle: the other engines.
        backend: the engine kind.
        batch_size: pictures per run.
        rounds: how often each runs.

    Returns:
        Milliseconds of the reference's runs and of the other's; position r is round r.
    """
    with contextlib.ExitStack() as stack:
        requests = {}
        for place, path in enumerate((reference, bundle)):
            pipeline = stack.enter_context(Pipeline(path, backend, batch_size=batch_size))
            request = functools.partial(pipeline, **pipeline.placeholders(batch_size), decode=False)
            requests[place] = functools.partial(Clock().timed, request, graphs=False)
        interleaved(requests, 1)
        runs = interleaved(requests, rounds)
    return [run.wall_ms for run in runs[0]], [run.wall_ms for run in runs[1]]
