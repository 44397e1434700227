"""Measure built bundles side by side: whole sampling runs, the graphs in them, and fresh processes.

In: bundles, backends and batch sizes. Out: one dictionary of JSON values. All that is loaded is loaded before anything
is timed, and all contenders are timed in one interleaved run.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.bench.clock import Clock, Run, step_by_step
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.report import FULL_RUN, PLAN_RUN, host_share, runs_report, start_up_report, variants_report
from tc_deploy.bench.start_up import start_up
from tc_deploy.bundle import reading
from tc_deploy.errors import UsageError
from tc_deploy.hardware import hardware_line
from tc_deploy.manifest import BUNDLE_FOLDER, read_target
from tc_deploy.runtime.pipeline import Pipeline

WARMUP_ROUNDS = 2
START_UPS = 3
_WATCHED_RUN = "watched"
"""The plan's run with every graph timed."""


class _Contender:
    """A bundle, loaded with one backend and batch size, and its clock."""

    def __init__(self, path: Path, backend: str | None, batch_size: int | None) -> None:
        self.clock = Clock()
        try:
            self.pipeline = Pipeline(path, backend, batch_size=batch_size, watch=self.clock.watch, check_finite=False)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        self.model_batch = self.pipeline.batch_size * (2 if self.pipeline.manifest.guided else 1)

    def run(self, kind: str) -> Run:
        asked = self.pipeline.placeholders(self.pipeline.batch_size)
        watched = kind == _WATCHED_RUN
        request = functools.partial(self.pipeline, **asked, full=kind == FULL_RUN, decode=False)
        return self.clock.timed(
            functools.partial(request, on_step=step_by_step) if watched else request, graphs=watched
        )

    def facts(self) -> dict[str, Any]:
        schedule = self.pipeline.plan.run_schedule()
        target = read_target(self.pipeline.path, self.pipeline.backend)
        return {
            "bundle": str(self.pipeline.path),
            "backend": self.pipeline.backend,
            "backend_version": registry.backend(self.pipeline.backend).version(),
            "precision": target.computes_in,
            "options": target.options,
            "options_in_words": target.options_in_words,
            "batch_size": self.pipeline.batch_size,
            "steps_full": schedule.full_steps,
            "steps_cached": schedule.steps - schedule.full_steps,
        }


def bench_bundles(
    path: Path,
    backend: str | None = None,
    against: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    *,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a bundle, and others against it.

    Args:
        path: ``engines/NAME``.
        backend: which target; None as for ``load``.
        against: others, each ``BUNDLE`` (with the backend of the first) or ``BUNDLE:BACKEND``.
        batch_sizes: pictures per run; none takes the first bundle's own, or 1. All bundles run with all of them.
        rounds: how often each contender makes each kind of run.
        progress: told how far each part is.

    Returns:
        JSON values: the hardware, and per contender (each bundle with each batch size) its whole runs, the graphs in
        them, the host's share, and what a fresh process costs.

    Raises:
        BundleError: nothing exported or built in one of the places, or a file is missing, truncated or altered.
        BackendError: an engine is not installed or refuses the graphs.
        UsageError: a backend is unknown, or a batch size does not fit a bundle.
    """
    with ExitStack() as held:
        for bundle in (path, *(bundle_and_backend(other)[0] for other in against)):
            held.enter_context(reading(bundle, BUNDLE_FOLDER))
        return _measured(path, backend, against, batch_sizes, rounds, progress)


def _measured(
    path: Path,
    backend: str | None,
    against: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    with ExitStack() as stack:
        contenders = list(_contenders(stack, path, backend, against, batch_sizes))
        facts = [contender.facts() for contender in contenders]
        actions = {
            (number, kind): functools.partial(contender.run, kind)
            for number, contender in enumerate(contenders)
            for kind in (PLAN_RUN, FULL_RUN, _WATCHED_RUN)
        }
        interleaved(actions, WARMUP_ROUNDS, functools.partial(progress, "warming up"))
        timed = interleaved(actions, rounds, functools.partial(progress, "timing sampling runs in turn"))
        plans = [(contender.pipeline.plan, contender.model_batch) for contender in contenders]
    # The engines are closed: fresh processes have the machine to themselves.
    starts = {
        number: functools.partial(start_up, Path(fact["bundle"]), fact["backend"], fact["batch_size"])
        for number, fact in enumerate(facts)
    }
    started = interleaved(starts, min(rounds, START_UPS), functools.partial(progress, "starting fresh processes"))
    bundles = 1 + len(against)
    for number, fact in enumerate(facts):
        first = number - number % bundles
        runs, base = ({kind: timed[of, kind] for kind in (PLAN_RUN, FULL_RUN)} for of in (number, first))
        watched = timed[number, _WATCHED_RUN]
        fact["runs"] = runs_report(runs, base, fact["batch_size"])
        fact["host_share"] = host_share(watched)
        fact["variants"] = variants_report(watched, *plans[number])
        fact["start_up"] = start_up_report(started[number])
    return {
        "hardware": hardware_line(),
        "made_by": f"tc-deploy {__version__}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rounds": rounds,
        "contenders": facts,
    }


def _contenders(
    stack: ExitStack, path: Path, backend: str | None, against: Sequence[str], batch_sizes: Sequence[int]
) -> Iterator[_Contender]:
    """Load each bundle with each batch size; of one batch size all bundles, the first one first."""

    def load(path: Path, backend: str | None, batch_size: int | None) -> _Contender:
        contender = _Contender(path, backend, batch_size)
        stack.enter_context(contender.pipeline)
        return contender

    for batch_size in dict.fromkeys(batch_sizes) or (None,):
        first = load(path, backend, batch_size)
        yield first
        for other in against:
            other_path, other_backend = bundle_and_backend(other)
            other_backend = first.pipeline.backend if other_backend is None else other_backend
            yield load(other_path, other_backend, first.pipeline.batch_size)


def bundle_and_backend(text: str) -> tuple[Path, str | None]:
    """The bundle, and the backend if one is named, of ``BUNDLE`` or ``BUNDLE:BACKEND``.

    A folder that exists is a bundle, even with a colon in its name.
    """
    path, colon, backend = text.rpartition(":")
    return (Path(path), backend) if colon and not Path(text).is_dir() else (Path(text), None)
