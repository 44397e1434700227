"""Latents to pictures as each family's own pipeline does it after its last step, at two sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers_pipelines import WAN_DEVIATIONS, WAN_MEANS, tiny_autoencoder, tiny_wan_autoencoder
from tolerances import tolerance
from torch import Tensor

from tc_deploy.errors import ModelError
from tc_deploy.export.decoder import DecoderGraph, check_decoder
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.families import FAMILIES
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry, ModelOptions

EQUAL = tolerance("torch", "fp32", "max_abs")


def _autoencoder(levels: int = 1) -> Any:
    """Every setting that some pipeline looks at is set, so that one which looks at another's shows."""
    autoencoder = tiny_autoencoder(4, levels)
    autoencoder.register_to_config(
        scaling_factor=1.5, shift_factor=0.25, latents_mean=WAN_MEANS, latents_std=WAN_DEVIATIONS, force_upcast=True
    )
    return autoencoder


def _embeddings(geometry: Geometry) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {item.name: item.draw(1, generator) for item in geometry.conditions}


def _dit(transformer: Any, autoencoder: Any) -> Any:
    return diffusers.DiTPipeline(transformer, autoencoder, diffusers.DDIMScheduler())


def _pixart(transformer: Any, autoencoder: Any) -> Any:
    return diffusers.PixArtSigmaPipeline(None, None, autoencoder, transformer, diffusers.DPMSolverMultistepScheduler())


def _pixart_alpha(transformer: Any, autoencoder: Any) -> Any:
    return diffusers.PixArtAlphaPipeline(None, None, autoencoder, transformer, diffusers.DPMSolverMultistepScheduler())


def _sd3(transformer: Any, autoencoder: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder, *[None] * 6)


def _flux(transformer: Any, autoencoder: Any) -> Any:
    return diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), autoencoder, *[None] * 4, transformer)


def _wan(transformer: Any, autoencoder: Any) -> Any:
    return diffusers.WanPipeline(None, None, autoencoder, diffusers.FlowMatchEulerDiscreteScheduler(), transformer)


def _prompt(geometry: Geometry) -> dict[str, Any]:
    """What stands for a prompt: PixArt's and Wan's pipelines take embeddings, and PixArt's their mask."""
    given = _embeddings(geometry)
    arguments: dict[str, Any] = {"prompt_embeds": given["encoder_hidden_states"]}
    if "pooled_projections" in given:
        arguments["pooled_prompt_embeds"] = given["pooled_projections"]
    if "encoder_attention_mask" in given:
        arguments["prompt_attention_mask"] = given["encoder_attention_mask"]
    return arguments


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family's pipeline."""

    model: str
    """Of the zoo."""
    make: Callable[[Any, Any], Any]
    sizes: tuple[tuple[int, ...], ...]
    """Of the latents."""
    arguments: Callable[[Geometry], Mapping[str, Any]]
    """That the pipeline is called with."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the zoo's model."""
    autoencoder: Callable[[], Any] = _autoencoder


def _sized(geometry: Geometry, scale: int, **arguments: Any) -> dict[str, Any]:
    height, width = (scale * axis for axis in geometry.latent_shape[-2:])
    return {"height": height, "width": width, **_prompt(geometry), **arguments}


CASES = {
    "dit": Case(model="dit", make=_dit, sizes=((8, 8), (4, 4)), arguments=lambda _: {"class_labels": [3]}),
    "pixart": Case(
        model="pixart",
        make=_pixart,
        sizes=((8, 16), (16, 8)),
        arguments=lambda geometry: _sized(
            geometry, 1, guidance_scale=1.0, use_resolution_binning=False, negative_prompt=None
        ),
        changes={"use_additional_conditions": False},
    ),
    "pixart-alpha": Case(
        model="pixart",
        make=_pixart_alpha,
        sizes=((8, 8), (16, 8)),
        arguments=lambda geometry: _sized(
            geometry, 1, guidance_scale=1.0, use_resolution_binning=False, negative_prompt=None
        ),
        changes={"use_additional_conditions": False},
    ),
    "sd3": Case(
        model="sd3",
        make=_sd3,
        sizes=((8, 12), (4, 4)),
        arguments=lambda geometry: _sized(geometry, 2, guidance_scale=1.0),
        autoencoder=lambda: _autoencoder(2),
    ),
    "flux": Case(
        model="flux",
        make=_flux,
        sizes=((8, 12), (6, 4)),
        arguments=lambda geometry: {
            **_prompt(geometry),
            "height": 2 * geometry.grid[0],
            "width": 2 * geometry.grid[1],
        },
    ),
    "wan": Case(
        model="wan",
        make=_wan,
        sizes=((3, 4, 8), (1, 8, 4)),
        arguments=lambda geometry: {
            **_sized(geometry, 8, guidance_scale=1.0),
            "num_frames": 4 * geometry.latent_shape[1] - 3,
        },
        autoencoder=tiny_wan_autoencoder,
    ),
}


class _Last:
    """What any step of a scheduler gives: the latents that the pipeline is to decode."""

    def __init__(self, latents: Tensor) -> None:
        self.prev_sample = latents

    def __getitem__(self, index: int) -> Tensor:
        return self.prev_sample


@torch.no_grad()
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_decoder_is_given_what_the_pipeline_gives_it(name: str, size: int, monkeypatch: Any) -> None:
    case = CASES[name]
    model_class, config, options = zoo.MODELS[case.model]
    changes = dict(case.changes)
    if name == "dit":
        changes["sample_size"] = case.sizes[size][0]  # DiTPipeline makes pictures of the model's own size alone.
    transformer = getattr(diffusers, model_class)(**{**config, **changes}).eval()
    zoo.randomise(transformer, seed=0)
    autoencoder = case.autoencoder()
    family: Family = FAMILIES[model_class]
    chosen = ModelOptions(latent_size=case.sizes[size], text_tokens=options.text_tokens)
    geometry = family.geometry(transformer, chosen)
    pipe = case.make(transformer, autoencoder)
    pipe.set_progress_bar_config(disable=True)
    last = torch.randn((1, *geometry.latent_shape), generator=torch.Generator().manual_seed(size + 1))
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: _Last(last))
    arguments = {"guidance_scale": 1.0, **case.arguments(geometry)}
    made = pipe(**arguments, num_inference_steps=2, output_type="np", return_dict=False)[0]
    decoded = DecoderGraph(autoencoder, family, geometry).eval()(last)[0]
    images = (decoded / 2 + 0.5).clamp(0, 1)
    expected = torch.from_numpy(made)
    expected = expected.permute(0, 4, 1, 2, 3) if expected.ndim == 5 else expected.permute(0, 3, 1, 2)
    assert images.shape == expected.shape
    assert float((images - expected).abs().max()) <= EQUAL
    assert float(expected.std()) > 100 * EQUAL


# ------------------------------------------------------------------------------------------------ what is not looked at
@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("sd3", {"scaling_factor": None}, "scaling_factor: expected a finite number, not 0, found None"),
        ("sd3", {"scaling_factor": 0}, "found 0"),
        ("flux", {"shift_factor": "much"}, "shift_factor: expected a finite number, found much"),
        ("pixart", {"scaling_factor": float("nan")}, "found nan"),
        ("wan", {"latents_mean": [0.0]}, "latents_mean: expected 4 finite numbers"),
        ("wan", {"latents_std": None}, "latents_std: expected 4 finite numbers"),
        ("sd3", {"latent_shift_scale": 2.0}, "latent_shift_scale is no setting of AutoencoderKL in diffusers"),
        ("flux", {"batch_norm_eps": 1e-4}, "batch_norm_eps is no setting of AutoencoderKL in diffusers"),
    ],
)
def test_a_scaling_that_nobody_knows_is_refused(
    model: str, changes: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    autoencoder = tiny_wan_autoencoder() if model == "wan" else tiny_autoencoder(4)
    autoencoder.save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    loaded = zoo.model(model)
    with pytest.raises(ModelError) as raised:
        check_decoder(PipelineFolder(tmp_path, "decoder"), loaded.family, loaded.geometry)
    assert reason in str(raised.value)
    assert str(tmp_path / "vae") in str(raised.value)


def test_settings_that_scale_nothing_do_not_matter(tmp_path: Path) -> None:
    tiny_autoencoder(4).save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"made_for": "a test"}))
    check_decoder(PipelineFolder(tmp_path, "decoder"), zoo.model("sd3").family, zoo.model("sd3").geometry)
