"""Sampling runs in turn: how everything that a search times on engines is timed.

In: the full run's pipeline and others. Out: their times, round by round. Never: makes a figure of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from tc_deploy.bench.clock import Clock
from tc_deploy.bench.interleave import interleaved
from tc_deploy.runtime.pipeline import Pipeline


def times_in_turn(
    reference: Pipeline,
    others: Mapping[str, Pipeline],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[float], dict[str, list[float]]]:
    """Run all, once to warm up and then in rounds.

    Args:
        reference: of the model's own run, without caches.
        others: by name.
        rounds: how often each runs.
        progress: told how many runs are done, and of how many.

    Returns:
        Milliseconds of the reference's runs and of the others'; position r is round r.
    """
    requests = {}
    for name, pipeline in ((None, reference), *others.items()):
        request = functools.partial(pipeline, **pipeline.placeholders(pipeline.batch_size), decode=False)
        requests[name] = functools.partial(Clock().timed, request, graphs=False)
    total = (1 + rounds) * len(requests)
    interleaved(requests, 1, lambda done, _: progress(done, total))
    runs = interleaved(requests, rounds, lambda done, _: progress(len(requests) + done, total))
    times_ms = {name: [run.wall_ms for run in found] for name, found in runs.items()}
    reference_ms = times_ms.pop(None)
    return reference_ms, {name: times_ms[name] for name in others}
