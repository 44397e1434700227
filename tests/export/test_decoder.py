"""The decoder's graph against the autoencoder, as the pipelines use it after the last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from diffusers_pipelines import (
    WAN_DEVIATIONS,
    WAN_MEANS,
    shifted_autoencoder,
    tiny_autoencoder,
    tiny_t5,
    tiny_wan_autoencoder,
)
from tolerances import tolerance
from torch import Tensor

from tc_deploy.errors import ModelError, NotFiniteError, UsageError
from tc_deploy.export.decoder import export_decoder
from tc_deploy.export.parts import PipelineParts
from tc_deploy.manifest import ONNX_FOLDER
from tc_deploy.models import flux, pixart, sd3, wan
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.family import Family

EQUAL = tolerance("onnxruntime", "fp32", "max_abs")


def _as_sd3(autoencoder: Any, latents: Tensor) -> Tensor:
    decoded: Tensor = autoencoder.decode(latents / 1.5 + 0.25, return_dict=False)[0]
    return decoded


def _as_flux(autoencoder: Any, latents: Tensor) -> Tensor:
    unpacked = diffusers.FluxPipeline._unpack_latents(latents, 8, 12, 1)
    return _as_sd3(autoencoder, unpacked)


def _as_wan(autoencoder: Any, latents: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in (WAN_MEANS, WAN_DEVIATIONS))
    decoded: Tensor = autoencoder.decode(latents / (1.0 / deviation) + mean, return_dict=False)[0]
    return decoded


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    """Of the zoo."""
    family: Family
    autoencoder: Callable[[], Any]
    decode: Callable[[Any, Tensor], Tensor]
    shape: tuple[int, ...]
    """Of one picture."""
    batch_size: int | None = None


CASES = {
    "sd3": Case(
        model="sd3", family=sd3.FAMILY, autoencoder=lambda: shifted_autoencoder(4, 2), decode=_as_sd3, shape=(3, 16, 24)
    ),
    "flux": Case(
        model="flux",
        family=flux.FAMILY,
        autoencoder=lambda: shifted_autoencoder(4, 1),
        decode=_as_flux,
        shape=(3, 8, 12),
        batch_size=3,
    ),
    "wan": Case(model="wan", family=wan.FAMILY, autoencoder=tiny_wan_autoencoder, decode=_as_wan, shape=(3, 5, 8, 16)),
    # As Wan 2.2 TI2V-5B's: residual ways around the blocks, and pixels packed two by two.
    "wan 2.2": Case(
        model="wan",
        family=wan.FAMILY,
        autoencoder=lambda: tiny_wan_autoencoder(is_residual=True, in_channels=12, out_channels=12, patch_size=2),
        decode=_as_wan,
        shape=(3, 5, 16, 32),
    ),
}


@pytest.mark.parametrize(
    "name", ["sd3", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "wan 2.2"))]
)
def test_pictures_are_the_autoencoder_s(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    autoencoder = case.autoencoder()
    autoencoder.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / ONNX_FOLDER).mkdir()
    geometry = zoo.model(case.model).geometry
    part, component = export_decoder(
        PipelineFolder(tmp_path / "pipeline", "decoder"),
        case.family,
        geometry,
        tmp_path,
        batch_size=case.batch_size,
        trajectory=None,
        check=True,
        progress=lambda what: None,
    )
    assert (component.name, component.model_class) == ("vae", type(autoencoder).__name__)
    assert part.graph.outputs[0].shape == (case.batch_size or "batch", *case.shape)
    assert part.graph.max_abs_error is not None
    latents = torch.randn((case.batch_size or 3, *geometry.latent_shape), generator=torch.Generator().manual_seed(9))
    session = onnxruntime.InferenceSession(tmp_path / ONNX_FOLDER / "decoder.onnx")
    (found,) = session.run(["images"], {"latents": latents.numpy()})
    with torch.no_grad():
        expected = case.decode(autoencoder, latents).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=EQUAL)


def parts(model: str, pipeline: Path, family: Family = sd3.FAMILY) -> PipelineParts:
    return PipelineParts(pipeline, family, zoo.model(model).geometry, decoder=True, text_encoder=False)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x: no such folder to take the decoder from; name the .* with --pipeline"):
        parts("sd3", tmp_path / "x")
    with pytest.raises(ModelError, match=r"vae/config.json is missing; name the diffusers pipeline folder that holds"):
        parts("sd3", tmp_path)
    tiny_autoencoder(4).save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:100])
    with pytest.raises(ModelError, match=r"not a whole safetensors file"):
        parts("sd3", tmp_path)
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.bin: a pickle can run code when it is read"):
        parts("sd3", tmp_path)


def test_parts_with_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    autoencoder, encoder = tiny_autoencoder(4), tiny_t5(24)
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight[0, 0, 0, 0] = torch.nan
        encoder.shared.weight[1, 2] = torch.inf
    autoencoder.save_pretrained(tmp_path / "vae")
    encoder.save_pretrained(tmp_path / "text_encoder")
    folder = PipelineFolder(tmp_path, "parts")
    with pytest.raises(NotFiniteError, match=r"vae/.*\.safetensors: the weights of decoder.conv_in.weight hold NaN"):
        folder.autoencoder()
    with pytest.raises(NotFiniteError, match=r"text_encoder/.*\.safetensors: the weights of shared.weight hold inf"):
        folder.text_encoder(pixart.TEXT.parts[0])


def test_an_autoencoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(
        ModelError, match=r"the decoder of 'AutoencoderDC' is not known to export; known: AutoencoderKL,"
    ):
        parts("sd3", tmp_path)


@pytest.mark.parametrize("model", ["sd3", "wan"])
def test_an_autoencoder_of_other_latents_is_refused(model: str, tmp_path: Path) -> None:
    tiny_autoencoder(8 if model == "sd3" else 4).save_pretrained(tmp_path / "vae")
    (tmp_path / ONNX_FOLDER).mkdir()
    settings: dict[str, Any] = {"batch_size": None, "trajectory": None, "check": False}
    with pytest.raises(ModelError, match=r"channels does not decode latents of shape \(4, .* own pipeline with"):
        parts(model, tmp_path).export(tmp_path, **settings, progress=lambda what: None)


def test_a_model_of_pictures_needs_no_decoder(tmp_path: Path, pixel_geometry: Any) -> None:
    with pytest.raises(UsageError, match=r"the model's latents are pictures already; export without --with-decoder"):
        PipelineParts(tmp_path, sd3.FAMILY, pixel_geometry, decoder=True, text_encoder=False)


@pytest.fixture
def pixel_geometry() -> Any:
    import dataclasses

    return dataclasses.replace(zoo.model("dit").geometry, latent_shape=(3, 8, 8))
