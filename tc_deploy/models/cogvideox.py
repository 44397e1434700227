"""CogVideoX, text to video (``CogVideoXTransformer3DModel``): joint attention over text, frames, rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.packed import embedding
from tc_deploy.models.regions import centred_region
from tc_deploy.models.rows import Rows
from tc_deploy.models.scaling import by_factor


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (1, config.patch_size, config.patch_size)
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    size = latent_size(options, (frames, config.sample_height, config.sample_width), patch)
    grid = token_grid(size, patch)
    text = text_length(options, config.max_text_seq_length)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(size[0], config.in_channels, *size[1:]),
        output_channels=size[0],
        conditions=(embedding("encoder_hidden_states", text, config.text_embed_dim),),
        text_tokens=text,
    )


def _call(module: Any, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    config, (frames, rows, columns) = module.config, geometry.grid
    tables = None
    if config.use_rotary_positional_embeddings:
        base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        tables = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=centred_region((rows, columns), base),
            grid_size=(rows, columns),
            temporal_size=frames,
            device=inputs["hidden_states"].device,
        )
    return call_diffusers(module, {**inputs, "image_rotary_emb": tables}, geometry)


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    channels, made = config.get("in_channels", 16), config.get("out_channels", 16)
    if channels != made:
        return f"{channels} channels in and {made} out (image to video, control)"
    return "patches over frames (patch_size_t, CogVideoX 1.5)" if config.get("patch_size_t") else None


def _unpacked(latents: Tensor, geometry: Geometry) -> Tensor:  # noqa: ARG001
    """(B, F, C, H, W) to (B, C, F, H, W)."""
    return latents.transpose(1, 2)


FAMILY = Family(
    model_class="CogVideoXTransformer3DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states"),
            takes=Rows.IMAGE_AND_TEXT,
            gives=Rows.IMAGE_AND_TEXT,
            entries=("norm1", "norm2"),
            branches=(
                Branch(name="attention", exit="attn1", rows=Rows.IMAGE_AND_TEXT),
                Branch(name="mlp", exit="ff", rows=Rows.TEXT_IMAGE),
            ),
            attentions=(
                SelfAttention(module="attn1", keys=Rows.TEXT_IMAGE, rotary=Rotary(argument="image_rotary_emb", axis=0)),
            ),
        ),
    ),
    geometry=_geometry,
    check=_check,
    call=_call,
    convention=Convention(pipelines=("CogVideoXPipeline",), scales_noise=True),
    unpacked=_unpacked,
    unscaled=by_factor,
)
