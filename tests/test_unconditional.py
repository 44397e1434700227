"""A model that nothing conditions, from a registered family to pictures, against diffusers' own loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from bundles import run_cli
from safetensors.torch import save_file
from tolerances import tolerance
from torch import Tensor, nn
from zoo import randomise

import tc_deploy
from tc_deploy.errors import UsageError
from tc_deploy.models import dit, loading
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry, ModelOptions

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 4} | {
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1,
}
STEPS, COUNT = 4, 3


class Unconditional(nn.Module):
    """A DiT that always makes the same class."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dit = diffusers.DiTTransformer2DModel(**config)
        self.transformer_blocks = self.dit.transformer_blocks

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        label = torch.zeros_like(timestep, dtype=torch.int64)
        output: Tensor = self.dit(latents, timestep, label, return_dict=False)[0]
        return output


def _geometry(module: Any, options: ModelOptions) -> Geometry:
    return dataclasses.replace(dit.FAMILY.geometry(module.dit, options), conditions=())


FAMILY = Family(
    model_class="Unconditional",
    blocks=dit.FAMILY.blocks,
    geometry=_geometry,
    call=lambda module, inputs, geometry: module(inputs["hidden_states"], inputs["timestep"]),
    build=lambda config: Unconditional({name: config[name] for name in CONFIG}),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loading.register_family(FAMILY)
    folder = tmp_path_factory.mktemp("unconditional")
    module = Unconditional(CONFIG)
    randomise(module, seed=0)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Unconditional", **CONFIG}))
    # The blocks are shared by two names, and a file holds each tensor once.
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    for words in (
        ("calibrate", model, "--steps", STEPS, "--samples", 1, "--keep-counts", "8", "0", "-o", folder / "plan"),
        ("export", folder / "plan", "-o", folder / "bundle"),
        ("build", folder / "bundle", "--threads", 1),
    ):
        answer = run_cli(*words)
        assert answer.code == 0, answer.err
    return folder / "bundle"


@torch.no_grad()
def _diffusers_loop(noise: Tensor) -> Tensor:
    module = Unconditional(CONFIG)
    randomise(module, seed=0)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents = noise
    for t in scheduler.timesteps:
        latents = scheduler.step(module.eval()(latents, t.expand(len(latents)).float()), t, latents).prev_sample
    return latents


def test_pictures_are_diffusers_own(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    answer = run_cli("generate", bundle, "-n", COUNT, "--full", "-o", output)
    assert answer.code == 0, answer.err
    found = safetensors.numpy.load_file(output)["latents"]
    with tc_deploy.load(bundle, batch_size=2) as pipeline:
        expected = _diffusers_loop(torch.from_numpy(pipeline.noise(0, COUNT))).numpy()
        assert np.array_equal(pipeline(count=COUNT, full=True).latents, found)
        assert len(pipeline().latents) == 1
        with pytest.raises(UsageError, match="takes no condition; give count"):
            pipeline(class_labels=[1])
        with pytest.raises(UsageError, match="count must be at least 1, found 0"):
            pipeline(count=0)
    assert (
        np.abs(found - expected).max()
        <= tolerance("onnxruntime", "fp32", "trajectory_max_rel") * np.abs(expected).max()
    )


def test_it_is_validated(bundle: Path) -> None:
    answer = run_cli("validate", bundle)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--class-label", 1), "takes no condition; give -n alone"),
        (("--prompt", "a cat"), "takes no condition; give -n alone"),
        (("-n", 0), "0 is not in the range 1<=x<="),
    ],
)
def test_what_it_cannot_be_told_is_refused(
    bundle: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    answer = run_cli("generate", bundle, *words, "-o", tmp_path / "out.npy")
    assert (answer.code, message in answer.error) == (UsageError.exit_code, True), answer.err


def test_guidance_has_nothing_to_go_by(model: Path, tmp_path: Path) -> None:
    answer = run_cli("calibrate", model, "--guidance-scale", 2, "--samples", 0, "-o", tmp_path / "plan")
    assert answer.code == UsageError.exit_code
    assert "takes no condition, so it has nothing to be guided by; leave it out" in answer.error
