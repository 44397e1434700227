"""Guidance by its pipeline's names: none at 1 and less, as in DiTPipeline; FLUX from its folder to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
import zoo
from bundles import Made, MadeByCommands, run_cli
from diffusers_pipelines import tiny_autoencoder
from prompted import CASES, STEPS, TEXT
from tolerances import tolerance

import tc_deploy
from tc_deploy.errors import UsageError
from tc_deploy.plan import load_plan

EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
LABELS = [3, 8]


def _error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _pipelines_latents(made: Made, labels: list[int], scale: float, steps: int) -> tuple[Any, Any]:
    """The noise that an untouched DiTPipeline drew, and the latents that its decoder saw."""
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(made.model / "transformer").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(made.model / "scheduler")
    pipe = diffusers.DiTPipeline(transformer, tiny_autoencoder(4), scheduler)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(4)
    pipe(class_labels=labels, guidance_scale=scale, num_inference_steps=steps, generator=generator, output_type="pt")
    noise = torch.randn((len(labels), 4, 8, 8), generator=torch.Generator().manual_seed(4))
    return noise.numpy(), (seen[0] * pipe.vae.config.scaling_factor).numpy()


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_guided_bundle_at_one_and_less_makes_the_pipeline_s_unguided_picture(
    mixed: Made, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    with tc_deploy.load(mixed.bundle, batch_size=2) as pipeline:
        noise, expected = _pipelines_latents(mixed, LABELS, scale, pipeline.plan.schedule.steps)
        found = pipeline(class_labels=LABELS, latents=noise, guidance_scale=scale, full=True).latents
        assert _error(found, expected) <= EQUAL
        other = pipeline(class_labels=LABELS[::-1], latents=noise, guidance_scale=scale, full=True).latents
        assert _error(other, expected) > 100 * EQUAL
    assert f"a guidance scale of {scale:g} is none, as in diffusers" in caplog.text


def test_an_unguided_bundle_takes_no_guidance_and_says_how_to_have_it(pixel: MadeByCommands) -> None:
    with tc_deploy.load(pixel.bundle) as pipeline:
        usual = pipeline(class_labels=[1], seed=3).latents
        for scale in (0, 1.0):
            assert np.array_equal(pipeline(class_labels=[1], seed=3, guidance_scale=scale).latents, usual)
        with pytest.raises(
            UsageError, match="exported without guidance; to have it, calibrate with --guidance-scale 2"
        ):
            pipeline(class_labels=[1], guidance_scale=2)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), 1e39, 1e30, 1001, "2"])
def test_no_scale_is_negative_or_not_finite(mixed: Made, scale: Any) -> None:
    with tc_deploy.load(mixed.bundle) as pipeline:
        for name in ("guidance_scale", "true_cfg_scale"):
            with pytest.raises(UsageError, match=f"{name}: guidance scale must be a number from 0 to 1000"):
                pipeline(class_labels=[1], **{name: scale})


def test_a_model_without_distilled_guidance_has_one_name_for_it(mixed: Made) -> None:
    with tc_deploy.load(mixed.bundle) as pipeline, pytest.raises(UsageError, match="its guidance is guidance_scale"):
        pipeline(class_labels=[1], true_cfg_scale=2.0)


# ------------------------------------------------------------------------------------------------------------- FLUX
@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A FLUX.1-dev-like pipeline folder, and its pipeline."""
    folder = tmp_path_factory.mktemp("flux")
    zoo.save("flux", folder / "model", num_layers=1, num_single_layers=1)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder / "model").eval()
    pipe = CASES["flux"].make(transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipe


@pytest.fixture(scope="module")
def plan(flux: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user goes on; sizes are the tiny model's."""
    folder = tmp_path_factory.mktemp("plan")
    sizes = ("--height", 8, "--width", 12, "--text-tokens", TEXT, "--steps", STEPS, "--samples", 1)
    prompts = ("--prompt", "a cat", "--prompt", "a red mat")
    made = run_cli("calibrate", flux[0], *prompts, *sizes, "-o", folder / "plan")
    assert made.code == 0, made.err
    return folder / "plan"


def test_flux_is_calibrated_without_a_word_on_sampling(flux: tuple[Path, Any], plan: Path) -> None:
    _, pipe = flux
    pipe("a cat", num_inference_steps=STEPS, height=8, width=12, max_sequence_length=TEXT, output_type="latent")
    sampling = load_plan(plan)[0].sampling
    assert list(sampling.timesteps) == pipe.scheduler.timesteps.tolist()
    assert (sampling.guidance_scale, sampling.true_cfg) == (None, True)


@pytest.mark.slow
def test_flux_goes_from_prompts_to_the_pipeline_s_picture(flux: tuple[Path, Any], plan: Path, tmp_path: Path) -> None:
    _, pipe = flux
    bundle, output = tmp_path / "bundle", tmp_path / "out.safetensors"
    for words in (("export", plan, "-o", bundle, "--with-decoder", "--with-text-encoder"), ("build", bundle)):
        answer = run_cli(*words)
        assert answer.code == 0, answer.err
    with tc_deploy.load(bundle) as pipeline:
        noise = torch.from_numpy(pipeline.noise(0, 1))
    asked = {"num_inference_steps": STEPS, "height": 8, "width": 12, "max_sequence_length": TEXT, "latents": noise}
    # FluxPipeline's own default is 3.5.
    for guidance in ({}, {"guidance_scale": 1.5}, {"guidance_scale": 0.0}):
        options = [word for name, value in guidance.items() for word in (f"--{name.replace('_', '-')}", value)]
        answer = run_cli("generate", bundle, "--prompt", "a cat", *options, "--full", "--force", "-o", output)
        assert answer.code == 0, answer.err
        expected = pipe("a cat", **asked, **guidance, output_type="latent").images.numpy()
        assert _error(safetensors.numpy.load_file(output)["latents"], expected) <= EQUAL
    refused = run_cli("generate", bundle, "--prompt", "a cat", "--true-cfg-scale", 2, "--force", "-o", output)
    assert "exported without guidance; to have it, calibrate with --true-cfg-scale 2" in refused.error
