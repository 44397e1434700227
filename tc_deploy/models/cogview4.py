"""CogView4 (``CogView4Transformer2DModel``): joint attention; one MLP for picture and text, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.models.convention import Convention, Shift, root_shift, whole_timesteps
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.packed import embedding
from tc_deploy.models.rows import Rows
from tc_deploy.models.scaling import by_factor

TEXT_TOKENS = 224
AUTOENCODER_SCALE = 8
"""Pixels per latent, along an axis: the model is told the picture's size in pixels."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    grid = token_grid(size, patch)
    text = text_length(options, TEXT_TOKENS)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels,
        conditions=(embedding("encoder_hidden_states", text, config.text_embed_dim),),
        text_tokens=text,
    )


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    latents = inputs["hidden_states"]
    pixels = [float(AUTOENCODER_SCALE * axis) for axis in geometry.latent_shape[1:]]
    size = torch.tensor([pixels], device=latents.device).expand(latents.shape[0], -1)
    # Its forward would make the tables on the CPU, where no index of the kept tokens can read them.
    tables = tuple(table.to(latents.device) for table in module.rope(latents))  # type: ignore[operator]
    given = {
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
        "image_rotary_emb": tables,
    }
    return call_diffusers(module, {**inputs, **given}, geometry)


FAMILY = Family(
    model_class="CogView4Transformer2DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states"),
            takes=Rows.IMAGE_AND_TEXT,
            gives=Rows.IMAGE_AND_TEXT,
            entries=("norm1", "norm2"),
            branches=(
                Branch(name="attention", exit="attn1", rows=Rows.IMAGE_AND_TEXT),
                Branch(name="mlp", exit="ff", then=Rows.TEXT),
            ),
            attentions=(
                SelfAttention(module="attn1", keys=Rows.TEXT_IMAGE, rotary=Rotary(argument="image_rotary_emb", axis=0)),
            ),
        ),
    ),
    geometry=_geometry,
    call=_call,
    convention=Convention(
        pipelines=("CogView4Pipeline",),
        sigmas=whole_timesteps,
        shift=Shift.ALWAYS,
        mu=root_shift,
    ),
    unscaled=by_factor,
)
