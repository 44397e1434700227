"""The candidates of a search, and the choice of those that are tried.

In: a recipe's lists. Out: distinct candidates, and with a function that judges one, all that were judged. Never:
samples or times anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from tc_deploy.calibrate.recipe import SearchRecipe
from tc_deploy.errors import PlanError
from tc_deploy.schedule import FULL, PHASES, Schedule, tprr
from tc_deploy.search.pareto import front
from tc_deploy.types import Attention, Reuse, Skip

SHARES = (0.5, 0.25)
"""Of the full run's latency, at which the best points are compared."""
ASKS_PER_TRIAL = 10
"""The optimiser may ask for what it has seen; after so many questions per trial the search ends."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule and cache settings; keep counts follow from the ratio and the importance of blocks."""

    phase_start: int
    cache_interval_early: int
    cache_interval_late: int
    keep_ratio: tuple[float, float]
    forecast_order: int
    reuse: Reuse
    attention: Attention
    skip: Skip

    def schedule(self, steps: int) -> Schedule:
        """Its TPRR schedule."""
        return tprr(
            steps=steps,
            phase_start=self.phase_start,
            cache_interval_early=self.cache_interval_early,
            cache_interval_late=self.cache_interval_late,
        )

    @property
    def keeps_tokens(self) -> bool:
        """Whether some cached step computes tokens."""
        return any(self.keep_ratio)

    @property
    def runs_blocks(self) -> bool:
        """Whether some cached step runs the model."""
        return self.keeps_tokens or self.skip is Skip.BLOCKS


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate and what it was found to be."""

    candidate: Candidate
    latency_ratio: float
    psnr_db: float


def candidates(recipe: SearchRecipe, steps: int) -> dict[tuple[Any, ...], Candidate]:
    """All distinct candidates, by what tells them apart.

    Two that run the same steps in the same way are one: where a phase has no cached step its keep ratio says nothing,
    where the model is skipped neither reuse nor attention does, and where all phases keep tokens nothing is skipped.

    Raises:
        PlanError: none of them has a cached step.
    """
    found: dict[tuple[Any, ...], Candidate] = {}
    dimensions = _dimensions(recipe, steps)
    for values in product(*dimensions.values()):
        candidate = _candidate(dict(zip(dimensions, values, strict=True)))
        if any(candidate.schedule(steps).variants):
            found.setdefault(identity(candidate, steps), candidate)
    if not found:
        raise PlanError(f"search: no candidate has a cached step in {steps} steps; list intervals above 1")
    return found


def identity(candidate: Candidate, steps: int) -> tuple[Any, ...]:
    """What a candidate's sampling run depends on."""
    variants = candidate.schedule(steps).variants
    used = [phase for phase in PHASES if phase in variants]
    # A phase's budget is spent by the importance of its own steps: where tokens are kept it matters which steps are one
    # phase, and where none are it does not.
    done: dict[int, Any] = {FULL: FULL}
    for place, phase in enumerate(used):
        ratio = candidate.keep_ratio[phase - 1]
        done[phase] = (place, ratio) if ratio else candidate.skip
    run = tuple(done[variant] for variant in variants)
    reuse = () if set(run) <= {FULL, Skip.MODEL} else (candidate.reuse,)
    attention = (candidate.attention,) if any(candidate.keep_ratio[phase - 1] for phase in used) else ()
    return (run, candidate.forecast_order, *reuse, *attention)


def judge_candidates(
    recipe: SearchRecipe, steps: int, seed: int, judge: Callable[[Candidate], Judged]
) -> tuple[Judged, ...]:
    """Judge every candidate, or as many as the recipe allows.

    Exhaustive where that is no more than ``trials``; otherwise optuna's multi-objective TPE chooses, after a start with
    equal and halved intervals. The same seed and the same judgements give the same choice.

    Args:
        recipe: lists and ``trials``.
        steps: T.
        seed: of the optimiser.
        judge: samples with a candidate.

    Returns:
        In the order in which they were judged; at least one.
    """
    space = candidates(recipe, steps)
    if len(space) <= recipe.trials:
        return tuple(judge(candidate) for candidate in space.values())
    judged: dict[tuple[Any, ...], Judged] = {}
    for candidate in _asked(recipe, steps, seed, judged):
        key = identity(candidate, steps)
        if key in space and key not in judged:
            judged[key] = judge(space[key])
        if len(judged) == recipe.trials:
            break
    if not judged:  # the optimiser asked for full runs alone
        return (judge(next(iter(space.values()))),)
    return tuple(judged.values())


def _asked(recipe: SearchRecipe, steps: int, seed: int, judged: dict[tuple[Any, ...], Judged]) -> Iterator[Candidate]:
    """What optuna asks for; it is told what was found once the consumer comes back."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dimensions = _dimensions(recipe, steps)
    # Categorical choices are told to optuna by position: it wants plain values.
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.IntDistribution(0, len(values) - 1) for name, values in dimensions.items()
    }
    study = optuna.create_study(
        directions=("minimize", "maximize"), sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True)
    )
    for start in _starts(dimensions):
        study.enqueue_trial(start)
    for _ in range(ASKS_PER_TRIAL * recipe.trials):
        trial = study.ask(distributions)
        candidate = _candidate({name: values[trial.params[name]] for name, values in dimensions.items()})
        yield candidate
        found = judged.get(identity(candidate, steps))
        if found is None:  # no cached step: the full run
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, (found.latency_ratio, found.psnr_db))


def _starts(dimensions: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, int]]:
    """Where the optimiser starts, by position in each list.

    The lowest keep ratio at the middle start of phase 2; for every forecast order and way to skip, each interval above
    1 in phase 1 with the same and with half of it in phase 2. Then each interval with tokens kept in both phases: left
    to itself the optimiser may never ask for any where skipping alone does well, and what they are worth stays unknown.
    """
    fixed = dict.fromkeys(dimensions, 0) | {"phase_start": len(dimensions["phase_start"]) // 2}
    for order, skip in product(range(len(dimensions["forecast_order"])), range(len(dimensions["skip"]))):
        for position, cache_interval_early in enumerate(dimensions["cache_interval_early"]):
            for cache_interval_late in dict.fromkeys((cache_interval_early, max(1, cache_interval_early // 2))):
                if cache_interval_early > 1 and cache_interval_late in dimensions["cache_interval_late"]:
                    intervals = {
                        "cache_interval_early": position,
                        "cache_interval_late": dimensions["cache_interval_late"].index(cache_interval_late),
                    }
                    yield fixed | intervals | {"forecast_order": order, "skip": skip}
    kept = next((position for position, ratio in enumerate(dimensions["keep_1"]) if ratio), None)
    if kept:
        for position, cache_interval_early in enumerate(dimensions["cache_interval_early"]):
            if cache_interval_early > 1 and cache_interval_early in dimensions["cache_interval_late"]:
                intervals = {
                    "cache_interval_early": position,
                    "cache_interval_late": dimensions["cache_interval_late"].index(cache_interval_early),
                }
                yield (
                    fixed
                    | intervals
                    | {"keep_1": kept, "keep_2": kept}
                    | {"forecast_order": len(dimensions["forecast_order"]) - 1}
                )


def _dimensions(recipe: SearchRecipe, steps: int) -> dict[str, tuple[Any, ...]]:
    """The recipe's lists without repetitions, keep ratios from the lowest on, starts of phase 2 in steps."""
    keep = tuple(sorted(set(recipe.keep_ratio)))
    return {
        "phase_start": tuple(sorted({round(share * steps) for share in recipe.phase_start})),
        "cache_interval_early": tuple(sorted(set(recipe.cache_interval_early))),
        "cache_interval_late": tuple(sorted(set(recipe.cache_interval_late))),
        "keep_1": keep,
        "keep_2": keep,
        "forecast_order": tuple(sorted(set(recipe.forecast_order))),
        "reuse": tuple(dict.fromkeys(recipe.reuse)),
        "attention": tuple(dict.fromkeys(recipe.attention)),
        "skip": tuple(dict.fromkeys(recipe.skip)),
    }


def _candidate(values: dict[str, Any]) -> Candidate:
    keep_ratio = (values.pop("keep_1"), values.pop("keep_2"))
    return Candidate(**values, keep_ratio=keep_ratio)


def chosen_for_engines(judged: Sequence[Judged], points: int) -> tuple[Judged, ...]:
    """The candidates of which engines are built.

    The front's best at each of ``points`` latencies, evenly spaced by ratio from the fastest to the slowest, and at
    :data:`SHARES`, where plans are compared; and if none of these keeps a token, of the faster half of those that do
    the one that falls least below the front, so that what tokens are worth is measured whatever the search prefers.
    """
    ends = front(judged)
    fastest, slowest = ends[0].latency_ratio, ends[-1].latency_ratio
    # Between two equal ends rounding leaves some below both.
    limits = np.maximum([*np.geomspace(fastest, slowest, points), *SHARES], fastest)
    chosen = {[item for item in ends if item.latency_ratio <= limit][-1]: None for limit in limits}
    with_tokens = sorted((item for item in judged if item.candidate.keeps_tokens), key=lambda item: item.latency_ratio)
    with_tokens = with_tokens[: (len(with_tokens) + 1) // 2]
    if with_tokens and not any(item.candidate.keeps_tokens for item in chosen):
        chosen[max(with_tokens, key=lambda item: item.psnr_db - _front_psnr_db(ends, item.latency_ratio))] = None
    return tuple(sorted(chosen, key=lambda item: item.latency_ratio))


def _front_psnr_db(ends: Sequence[Judged], latency_ratio: float) -> float:
    below = [item.psnr_db for item in ends if item.latency_ratio <= latency_ratio]
    return max(below, default=ends[0].psnr_db)


def settings_of(judged: Judged) -> dict[str, Any]:
    """As JSON values, for the record."""
    figures = {"latency_ratio": round(judged.latency_ratio, 4), "psnr_db": round(judged.psnr_db, 2)}
    return asdict(judged.candidate) | figures
