"""A report's first lines: what a plan is, what it costs, how good it is and against what, in plain words.

In: a :class:`Source`. Out: sentences and how the plan stands. Never: leaves out that something else is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tc_deploy.plan import Plan
from tc_deploy.remarks import CLOSE_DB, saves_steps
from tc_deploy.report.source import Source
from tc_deploy.search.pareto import dominates
from tc_deploy.search.record import Kind, PointRecord, SearchRecord
from tc_deploy.types import Skip

NOISY_TIME = 0.2
"""Interquartile range of a time to the time: what spreads further cannot be compared within a few per cent."""


class Standing(StrEnum):
    """How a plan stands against what else there is."""

    AHEAD = "ahead"
    EVEN = "even"
    BEHIND = "behind"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The plan in plain words."""

    standing: Standing
    headline: str
    sentences: tuple[str, ...]


def verdict_from_source(source: Source) -> Verdict:
    """Say what the plan is and whether it earns its place."""
    about = (_steps_sentence(source.plan), _cost_sentence(source.plan))
    if source.search is None:
        standing, headline, sentences = _by_calibration(source.plan)
    elif source.chosen is None:
        standing, headline = Standing.UNKNOWN, "This plan is not among the points of the search beside it."
        sentences = ["So nothing that was measured there is about it; the points are shown below."]
    else:
        standing, headline, sentences = _by_search(source, source.search, source.chosen)
    return Verdict(standing=standing, headline=headline, sentences=(*about, *sentences))


def _steps_sentence(plan: Plan) -> str:
    schedule = plan.run_schedule()
    parts = [f"{schedule.full_steps} of {schedule.steps} steps run the whole model"]
    for phase, words in phase_words(plan).items():
        parts += [f"{len(schedule.cached_steps(phase))} cached steps of phase {phase} {words}"]
    return "; ".join(parts) + "."


def phase_words(plan: Plan) -> dict[int, str]:
    """What the cached steps of each phase in use do, as the end of a sentence about them."""
    return {phase: _what_is_computed(plan, phase) for phase in plan.phases_used()}


def _what_is_computed(plan: Plan, phase: int) -> str:
    kept = sum(plan.keep_counts(phase))
    source = "reuse" if plan.cache.forecast_order == 0 else "forecast"
    if plan.cache.skips_model(phase):
        return f"do not run it and {source} its output"
    if kept == 0 and plan.cache.skip is Skip.BLOCKS:
        return f"run only what stands around the blocks and {source} what these add"
    share = kept / (plan.model.tokens * plan.model.blocks)
    return f"compute {percent(share)} of the tokens of all blocks and {source} the rest"


def _cost_sentence(plan: Plan) -> str:
    cost = plan.cost_in_full_steps()
    return f"By FLOPs a run costs {cost:.1f} full steps, {percent(plan.cost_ratio())} of the full run."


def _by_calibration(plan: Plan) -> tuple[Standing, str, list[str]]:
    found = plan.measured
    if not saves_steps(plan):
        return Standing.BEHIND, "This plan saves nothing: run every step in full instead.", []
    if found is None:
        return Standing.UNKNOWN, "The quality of this plan was not measured.", []
    margin_db, exact = found.margin_db, found.converged
    target = "full" if exact is None else "converged"
    standing = _standing(margin_db)
    headline = {
        Standing.AHEAD: f"{decibels(margin_db)} closer to the {target} run than fewer steps at the same cost.",
        Standing.EVEN: f"Hardly different from fewer steps at the same cost ({decibels(margin_db, '+')}).",
        Standing.BEHIND: f"Fewer steps are {decibels(-margin_db)} better at the same cost: do not use this plan.",
    }[standing]
    quality = (
        f"On {len(found.seeds)} unseen seeds its pictures have {decibels(found.psnr_db)} PSNR to the model's own full"
        f" run; {found.fewer_steps} full steps, which is its cost rounded up, have"
        f" {decibels(found.fewer_steps_psnr_db)}."
    )
    if exact is not None:
        quality += (
            f" It was fitted towards the converged run of {exact.steps} steps: to that its pictures have"
            f" {decibels(exact.psnr_db)}, the full run's {decibels(exact.full_psnr_db)}, and those of"
            f" {found.fewer_steps} full steps {decibels(exact.fewer_steps_psnr_db)}."
        )
    source = (
        "This is calibration's measurement in PyTorch: latency was not measured, and the only baseline is fewer steps"
        " of the same solver."
    )
    return standing, headline, [quality, source]


def _standing(margin_db: float) -> Standing:
    if margin_db >= CLOSE_DB:
        return Standing.AHEAD
    return Standing.EVEN if margin_db > -CLOSE_DB else Standing.BEHIND


def _by_search(source: Source, search: SearchRecord, chosen: PointRecord) -> tuple[Standing, str, list[str]]:
    quality = chosen.quality
    measured = search.latency_source == "measured"
    time = "time" if measured else "estimated time"
    spread = f" (interquartile range {percent(chosen.latency_iqr)})" if measured else ""
    times = "" if chosen.latency_ms is None else f", {chosen.latency_ms:.0f} ms for {pictures(search.batch_size)}"
    figures = (
        f"A run takes {percent(chosen.latency_ratio)} of the full run's {time}{spread}{times},"
        f" at {decibels(quality.psnr_db)} PSNR to the full run's pictures"
        f" ({search.confirmation_seeds} seeds that the search did not see)."
    )
    sentences = [figures]
    if not measured:
        sentences.append("Nobody measured a latency: every time here is estimated from FLOPs.")
    better = [
        point
        for point in search.points
        if point.kind is not Kind.FULL and point.runtime == "engines" and dominates(point, chosen)
    ]
    best = source.best_baseline
    noise = chosen.latency_iqr / chosen.latency_ratio if measured else 0.0
    if noise > NOISY_TIME:
        standing = Standing.UNKNOWN
        headline = (
            f"The times spread too far for a verdict (interquartile range {percent(noise)} of the plan's own): search"
            " again on a machine that does nothing else."
        )
    elif better:
        winner = max(better, key=lambda point: point.quality.psnr_db)
        standing = Standing.BEHIND
        headline = f"Dominated: {described(winner)} is as fast or faster and closer to the full run. Use that instead."
    elif best is None:
        standing, headline = Standing.UNKNOWN, "No baseline was run at this latency, so nothing is shown by it."
    else:
        margin_db = quality.psnr_db - best.quality.psnr_db
        standing = _standing(margin_db)
        headline = {
            Standing.AHEAD: f"{decibels(margin_db)} closer to the full run than any baseline at comparable {time}.",
            Standing.EVEN: f"A baseline comes within {CLOSE_DB:g} dB at comparable {time}: {described(best)}.",
            Standing.BEHIND: f"{described(best)} is {decibels(-margin_db)} better and hardly slower: consider that.",
        }[standing]
    if best is not None:
        sentences.append(f"The best baseline at comparable {time} is {_figures(best)}.")
    beside = source.best_in_pytorch
    if beside is not None and beside.quality.psnr_db > quality.psnr_db - CLOSE_DB:
        full = "PyTorch's own full run, so that this says little of engines" if measured else "the full run's FLOPs"
        sentences.append(f"In PyTorch, {_figures(beside)}. That is a share of {full}.")
    if chosen.kind is not Kind.TOKEN_CACHE:
        sentences.append(f"The plan is itself a baseline's ({chosen.kind}): the search found nothing better.")
    sentences += _judged_by_convergence(source, chosen)
    return standing, headline, sentences


def _judged_by_convergence(source: Source, chosen: PointRecord) -> list[str]:
    """A better solver leaves the full run on purpose, so it is also judged by where both should arrive."""
    if chosen.converged_psnr_db is None:
        return []
    found = [
        (point.converged_psnr_db, point)
        for point in source.baselines
        if point.converged_psnr_db is not None and point.latency_ratio <= chosen.latency_ratio
    ]
    best_db, best = max(found, key=lambda pair: pair[0], default=(chosen.converged_psnr_db, chosen))
    if best_db <= chosen.converged_psnr_db:
        return []
    sentence = (
        f"Judged by a run of four times the steps instead, {described(best)} is closer at no more time:"
        f" {decibels(best_db)} against {decibels(chosen.converged_psnr_db)}."
    )
    return [sentence]


def described(point: PointRecord) -> str:
    """A point by its kind and its name."""
    return f"{point.name} ({point.kind})"


def _figures(point: PointRecord) -> str:
    whose = "PyTorch's full run's" if point.runtime == "pytorch" else "the full run's"
    return f"{described(point)}: {percent(point.latency_ratio)} of {whose} time, {decibels(point.quality.psnr_db)}"


def pictures(count: int) -> str:
    """``1 picture``, ``8 pictures``."""
    return "1 picture" if count == 1 else f"{count} pictures"


def percent(share: float) -> str:
    """A share as people read it: ``12.5 %``, never broken across lines."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%" if share < 1 else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def decibels(value: float, sign: str = "-") -> str:
    """Decibels as people read them: ``49.1 dB``; ``sign`` is ``+`` where a plus is to be shown too."""
    return f"{value:{sign}.1f}\N{NO-BREAK SPACE}dB".replace("-", "−")
