"""What is to be said of a guidance scale that is not the plan's.

In: a bundle's manifest and plan, and the scales that a request or a pipeline asks for. Out: sentences. Never: refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tc_deploy.manifest import Manifest
from tc_deploy.plan import Plan
from tc_deploy.runtime.request import GUIDANCE_SCALE, TRUE_CFG_SCALE


def remarks_on_guidance(manifest: Manifest, plan: Plan, asked: Mapping[str, Any]) -> Iterator[str]:
    """Say that a plan was neither measured nor fitted at the guidance that is asked for.

    Args:
        manifest: the bundle's.
        plan: the bundle's.
        asked: by the name that the family's pipeline has for it; what is missing or None is the plan's.
    """
    solver = manifest.solver
    planned = {GUIDANCE_SCALE: ("guidance scale", solver.guidance_scale)}
    if solver.true_cfg:
        embedded = solver.embedded_guidance if manifest.embeds_guidance else None
        planned = {
            GUIDANCE_SCALE: ("guidance scale", embedded),
            TRUE_CFG_SCALE: ("true CFG scale", solver.guidance_scale),
        }
    for name, (words, usual) in planned.items():
        given = asked.get(name)
        if usual is not None and isinstance(given, int | float) and given != usual:
            what = "forecast weights and its solver" if plan.solver_fitted else "forecast weights"
            fitted = "" if plan.forecast is None else f"; nor are its {what} fitted for that"
            yield f"the plan was calibrated at {words} {usual:g}, and is not measured at {given:g}{fitted}"
