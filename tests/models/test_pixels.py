"""Pixels to latents, against what diffusers' own pipelines reckon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers_pipelines import tiny_autoencoder

from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.pipeline_index import PipelineIndex
from tc_deploy.models.pixels import latent_size_of


def index_of(folder: Path, **config: Any) -> PipelineIndex:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return PipelineIndex(folder)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_a_picture_s_latents_are_as_small_as_in_its_pipeline(tmp_path: Path, levels: int) -> None:
    autoencoder = tiny_autoencoder(4, levels)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "transformer"))
    pipe = diffusers.PixArtSigmaPipeline(**parts, vae=autoencoder, scheduler=diffusers.DDIMScheduler())
    autoencoder.save_pretrained(tmp_path / "vae")
    side = pipe.vae_scale_factor
    assert latent_size_of(PipelineIndex(tmp_path), 64, 96, None) == (64 // side, 96 // side)


def test_a_video_s_latents_are_as_few_as_in_its_pipeline(tmp_path: Path) -> None:
    # WanPipeline: (num_frames - 1) // vae_scale_factor_temporal + 1, by the class's own 4 and 8.
    index = index_of(tmp_path, _class_name="AutoencoderKLWan")
    assert latent_size_of(index, 480, 832, 81) == (21, 60, 104)
    with pytest.raises(UsageError, match="num_frames: expected one more than a multiple of 4, found 80; take 77 or 81"):
        latent_size_of(index, 480, 832, 80)


def test_without_an_autoencoder_a_latent_is_a_pixel(tmp_path: Path) -> None:
    assert latent_size_of(PipelineIndex(tmp_path), 8, 12, None) == (8, 12)


def test_a_size_between_two_latents_is_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path, _class_name="AutoencoderKL", block_out_channels=[8, 8, 8, 8])
    with pytest.raises(UsageError, match=r"width: expected a multiple of 8, .* found 100; take 96 or 104"):
        latent_size_of(index, 64, 100, None)


def test_an_autoencoder_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a latent of VQModel covers is not known here; known: AutoencoderKL"):
        latent_size_of(index_of(tmp_path, _class_name="VQModel"), 64, 64, None)
