"""A plan is the same wherever PyTorch runs the model: shown without a GPU, on a second device made of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import zoo
from bundles import snapshot
from elsewhere import DEVICE, elsewhere
from torch.nn.attention import SDPBackend, sdpa_kernel

from tc_deploy.calibrate import asked, calibration
from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.tokencache.sampler import device_of

DIFFUSION = diffusers.DDIMScheduler(clip_sample=False)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
SHIFTED = ("flux", "flux2", "qwen-image", "z-image", "chroma", "longcat-image", "cogview4", "ltx-video")
"""Families whose pipelines give their scheduler sigmas, and a shift by the picture's size."""
QUICK = ("pixart", "qwen-image", "ltx-video")
"""A diffusion with cross attention, a flow with complex rotary tables, a video: the rest are slow together."""
SCHEDULERS = {
    "sd3": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "sd35": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    **dict.fromkeys(SHIFTED, FLOW),
    "flux-schnell": diffusers.FlowMatchEulerDiscreteScheduler(),
    "wan": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.NAMES]
)
def test_a_plan_is_the_same_on_another_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trajectories, training, cost and measurement of every family: noise is the CPU's, and so are all bytes."""
    recipe = _recipe(name, tmp_path / "model")
    monkeypatch.setattr(calibration, "check_device", lambda device: None)
    # Loaded before: diffusers loads by way of the device that plays the GPU here.
    model = load_model(Path(recipe.model), ModelOptions(latent_size=recipe.latent_size, text_tokens=recipe.text_tokens))
    monkeypatch.setattr(asked, "load_model", lambda *_: model)
    # One kernel for both: which one attention takes depends on the device.
    with sdpa_kernel(SDPBackend.MATH):
        calibrate(recipe, tmp_path / "here")
        with elsewhere():
            calibrate(recipe, tmp_path / "there", device=DEVICE.type)
            assert device_of(model) == DEVICE
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")


def _recipe(name: str, folder: Path) -> Recipe:
    """A pipeline folder with a model of the zoo, and a recipe that trains and measures a little, guided."""
    if name in zoo.MODELS:
        zoo.save(name, folder / "transformer")
    else:
        module = zoo.uvit().build(zoo.uvit().CONFIG)
        zoo.randomise(module, seed=0)
        zoo.uvit().save(folder / "transformer", module)
    SCHEDULERS.get(name, DIFFUSION).save_pretrained(folder / "scheduler")
    options: dict[str, Any] = {}
    if name in zoo.MODELS:
        given = zoo.MODELS[name][2]
        options = {"latent_size": given.latent_size, "text_tokens": given.text_tokens}
    guidance = "true_cfg_scale" if name.startswith(("flux", "qwen")) else "guidance_scale"
    return Recipe.model_validate(
        {
            "model": str(folder),
            "conditions": "random",
            "sampling": {"num_inference_steps": 5, guidance: 2.0},
            "schedule": {"phase_start": 3, "cache_interval_early": 2, "cache_interval_late": 2},
            "cache": {"keep_ratio": [0.5, 0.5], "multiple": 4, "forecast_order": 1, "attention": "all"},
            "predictor": {"trajectories": 2, "iterations": 3, "batch_size": 2},
            "measure": {"samples": 2},
            **options,
        }
    )
