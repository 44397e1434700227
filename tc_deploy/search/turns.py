"""Two bundles' runs in turn: how everything that a search times on engines is timed.

In: the full run's bundle and another. Out: their runs, round by round. Never: makes a figure of them.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from tc_deploy.bench.clock import Clock, Run, step_by_step
from tc_deploy.bench.interleave import interleaved
from tc_deploy.runtime.pipeline import Pipeline


def runs_in_turn(
    reference: Path, bundle: Path, backend: str, batch_size: int, rounds: int, *, graphs: bool
) -> tuple[list[Run], list[Run]]:
    """Run both, once to warm up and then in rounds.

    Args:
        reference: engines of the model's own run, without caches.
        bundle: the other engines.
        backend: the engine kind.
        batch_size: pictures per run.
        rounds: how often each runs.
        graphs: time every graph's call too; the runs' own times are then not to be quoted.

    Returns:
        Runs of the reference and of the other; position r is round r.
    """
    with contextlib.ExitStack() as stack:
        requests = {}
        for place, path in enumerate((reference, bundle)):
            clock = Clock()
            watch = clock.watch if graphs else None
            pipeline = stack.enter_context(Pipeline(path, backend, batch_size=batch_size, watch=watch))
            request = functools.partial(pipeline, **pipeline.placeholders(batch_size), decode=False)
            if graphs:
                request = functools.partial(request, on_step=step_by_step)
            requests[place] = functools.partial(clock.timed, request, graphs=graphs)
        interleaved(requests, 1)
        runs = interleaved(requests, rounds)
    return runs[0], runs[1]
