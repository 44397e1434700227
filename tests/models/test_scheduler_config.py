"""A scheduler's settings in a plan: every class that can be deployed, made from the settings of every other."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from bundles import make_plan, run_cli, save_scheduler

from tc_deploy.bundle import canonical_json
from tc_deploy.errors import ModelError
from tc_deploy.models.loading import load_scheduler, scheduler_from_config
from tc_deploy.models.scheduler_config import plain_config
from tc_deploy.plan import load_plan

# diffusers turns tensors into arrays in the way of numpy 1, which numpy 2 still takes but deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

DEPLOYABLE = (
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""The deterministic linear ones of diffusers 0.42.1."""
STEPS = 6


def _as_loaded(scheduler: Any) -> dict[str, Any]:
    """The settings as they are where a scheduler was loaded from a file, which holds its class's defaults too."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("target", DEPLOYABLE)
def test_settings_carried_over_from_another_class_are_dropped(target: str, tmp_path: Path) -> None:
    kind: Any = getattr(diffusers, target)
    ran = 0
    for source in DEPLOYABLE:
        # As a user swaps and saves: the settings that the class does not take go along.
        try:
            swapped = kind.from_config(_as_loaded(getattr(diffusers, source)()))
        except (NotImplementedError, TypeError, ValueError):
            continue  # the class refuses this mix of settings itself
        swapped.save_pretrained(tmp_path / source / "scheduler")
        (tmp_path / source / "config.json").write_text("{}")
        plain = plain_config(load_scheduler(tmp_path / source))
        assert {*plain} <= {*inspect.signature(kind).parameters}
        again = scheduler_from_config(target, json.loads(canonical_json(plain)), "plan")
        try:
            swapped.set_timesteps(STEPS)
        except (AssertionError, IndexError, ValueError):
            continue
        again.set_timesteps(STEPS)
        assert torch.equal(again.timesteps, swapped.timesteps)
        ran += 1
    assert ran > len(DEPLOYABLE) / 2


def test_a_plan_is_made_with_dpm_solver_s_settings_in_another_class(
    save_dit: Callable[..., Path], tmp_path: Path
) -> None:
    swapped = diffusers.DDIMScheduler.from_config(
        _as_loaded(diffusers.DPMSolverMultistepScheduler()), clip_sample=False
    )
    assert swapped.config["lambda_min_clipped"] == -float("inf")
    plan, _ = load_plan(make_plan(save_scheduler(save_dit(tmp_path / "dit"), swapped), tmp_path / "plan"))
    assert "lambda_min_clipped" not in plan.sampling.scheduler_config


def test_numpy_values_become_plain() -> None:
    betas = np.linspace(0.001, 0.02, 1000)
    scheduler = diffusers.DDIMScheduler(trained_betas=betas, beta_start=np.float32(0.5), clip_sample=False)
    plain = plain_config(scheduler)
    assert plain["trained_betas"] == betas.tolist()
    assert (plain["beta_start"], type(plain["beta_start"])) == (0.5, float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("inf")])
def test_what_is_not_finite_is_named(save_dit: Callable[..., Path], tmp_path: Path, value: Any) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.register_to_config(sample_max_value=value)
    with pytest.raises(ModelError, match=r"DDIMScheduler: sample_max_value is (nan|inf), expected a finite number"):
        plain_config(scheduler)
    model = save_dit(tmp_path / "dit")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_max_value": float(value)}))
    answer = run_cli("calibrate", model, "--samples", 0, "-o", tmp_path / "plan")
    assert answer.code == ModelError.exit_code
    assert "sample_max_value" in answer.error
