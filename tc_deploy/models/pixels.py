"""The size of pictures to that of the latents, as diffusers' pipelines reckon it.

In: a size in pixels, and a pipeline's index. Out: the latents' size. Never: loads an autoencoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.files import read_json
from tc_deploy.models.pipeline_index import AUTOENCODER, PipelineIndex

Scale = Callable[[Mapping[str, Any]], tuple[int, int]]
"""An autoencoder's configuration to what it shrinks: frames, and pixels along a side."""


def _by_levels(config: Mapping[str, Any]) -> tuple[int, int]:
    return 1, 2 ** (len(config["block_out_channels"]) - 1)


def _as_said(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])


SCALES: Mapping[str, Scale] = {"AutoencoderKL": _by_levels, "AutoencoderKLWan": _as_said}
"""By class, what its pipelines do in diffusers."""


def latent_size_of(pipeline: PipelineIndex, height: int, width: int, num_frames: int | None) -> tuple[int, ...]:
    """The latents of a picture, or of a video.

    Args:
        pipeline: the pipeline that the transformer is a part of; one without an autoencoder makes a pixel per latent.
        height: pixels.
        width: pixels.
        num_frames: of a video; None: a picture.

    Returns:
        (H, W), or (F, H, W).

    Raises:
        UsageError: the size is no multiple of what a latent covers.
        ModelError: the autoencoder's configuration cannot be read, or its class is not known.
    """
    frames, side = _scale(pipeline)
    for name, pixels in (("height", height), ("width", width)):
        if pixels % side:
            lower = pixels - pixels % side
            raise UsageError(
                f"{name}: expected a multiple of {side}, the pixels of one latent, found {pixels}; take"
                f" {lower or side} or {lower + side}"
            )
    size = height // side, width // side
    if num_frames is None:
        return size
    if (num_frames - 1) % frames:
        lower = num_frames - (num_frames - 1) % frames
        raise UsageError(
            f"num_frames: expected one more than a multiple of {frames}, found {num_frames}; take {lower} or"
            f" {lower + frames}"
        )
    return ((num_frames - 1) // frames + 1, *size)


def _scale(pipeline: PipelineIndex) -> tuple[int, int]:
    if not pipeline.has_autoencoder:
        return 1, 1
    path = pipeline.folder / AUTOENCODER
    config = read_json(path / "config.json")
    kind = str(config.get("_class_name"))
    if kind not in SCALES:
        raise ModelError(
            f"{path}: how many pixels a latent of {kind} covers is not known here; known: {', '.join(SCALES)}; say"
            " latent_size in a recipe instead"
        )
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return SCALES[kind]({name: parameter.default for name, parameter in known.items()} | config)
