"""Bundles to serve: tiny ones of families that no other test exports like this, kept between runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import zoo
from bundles import make_plan
from kept import Keep

from tc_deploy.backends.build import build_target
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions

PLANS: Mapping[str, tuple[str, Any, Mapping[str, Any], Mapping[str, Any]]] = {
    # F c1 F | F c2 c2 F c2: a solver that looks back, and second-order forecast.
    "pixart": (
        "pixart",
        diffusers.DPMSolverMultistepScheduler(),
        {"num_layers": 1, "use_additional_conditions": False},
        {
            "conditions": "random",
            "latent_size": (8, 12),
            "text_tokens": 5,
            "sampling": {"num_inference_steps": 8, "guidance_scale": 3.0},
            "schedule": {"phase_start": 3, "cache_interval_early": 2, "cache_interval_late": 3},
            "cache": {"keep_counts": ((8,), (5,)), "forecast_order": 2},
        },
    ),
    # F c1 c1 | F c2 c2: samples share the token index, and c2 skips the model.
    "flux": (
        "flux",
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"num_layers": 1, "num_single_layers": 1},
        {
            "conditions": "random",
            "latent_size": (8, 12),
            "text_tokens": 5,
            "sampling": {"num_inference_steps": 6},
            "schedule": {"phase_start": 3, "cache_interval_early": 3, "cache_interval_late": 3},
            "cache": {"keep_counts": ((8, 5), (0, 0)), "forecast_order": 1, "skip": "model"},
        },
    ),
}


def family_bundle(name: str, kept: Keep, folder: Path) -> Path:
    """A built bundle of :data:`PLANS`, in an empty folder; tests leave it as it is."""
    model, scheduler, changes, settings = PLANS[name]

    def make(folder: Path) -> None:
        zoo.save(model, folder / "model" / "transformer", **changes)
        scheduler.save_pretrained(folder / "model" / "scheduler")
        plan = make_plan(folder / "model", folder / "plan", **settings)
        export_bundle(plan, folder / "bundle", ExportOptions(check=False))

    bundle = Path(shutil.copytree(kept(f"serving-{name}", make, file=__file__) / "bundle", folder / "bundle"))
    build_target(bundle, options={"threads": 1})
    return bundle
