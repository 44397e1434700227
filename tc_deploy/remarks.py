"""What speaks against a plan by its own figures: said when it is made, and again wherever it is used.

In: a plan. Out: a sentence, or a warning in the log. Never: measures anything.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path

from tc_deploy.plan import Plan

LOG = logging.getLogger(__name__)
CLOSE_DB = 1.0
"""A baseline, as fewer steps are, within this much of a plan are as good, as far as a reader should care."""


def remark_on(plan: Plan) -> str | None:
    """What speaks against a plan by its own figures, as one line; None where nothing does."""
    schedule, found = plan.run_schedule(), plan.measured
    if schedule.full_steps == schedule.steps:
        return "nothing is cached: all steps run in full, so this is the full run; longer intervals change that"
    if not saves_steps(plan):
        return f"by FLOPs this plan saves less than one of its {schedule.steps} steps; keep less or lengthen intervals"
    if (verdict := verdict_against(plan)) is not None:
        return verdict
    if found is None:
        return None
    if found.margin_db < CLOSE_DB:
        return f"hardly different from running fewer steps at equal cost ({found.margin_db:+.1f} dB), which is simpler"
    return None


def saves_steps(plan: Plan) -> bool:
    """Whether a plan costs so much less than its full run that a run of fewer steps costs as much."""
    return math.ceil(plan.cost_in_full_steps()) < plan.schedule.steps


def verdict_against(plan: Plan) -> str | None:
    """Why a plan should not be used at all; None where it may be."""
    found = plan.measured
    if found is None or not saves_steps(plan) or found.margin_db > -CLOSE_DB:
        return None
    return "running fewer steps is better than this plan at equal cost; do not use it"


def warn_of_plan(plan: Plan, path: Path) -> None:
    """Repeat the verdict on a plan in the log where it is used; once in a process for each folder."""
    if (verdict := verdict_against(plan)) is not None:
        warn_once(f"{path}: {verdict}")


@functools.lru_cache(maxsize=256)
def warn_once(words: str) -> None:
    """Say something in the log, once in a process."""
    LOG.warning("%s", words)
