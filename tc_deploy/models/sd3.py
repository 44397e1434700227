"""Stable Diffusion 3 and 3.5 (``SD3Transformer2DModel``): image and text attend jointly; 3.5's first blocks twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from tc_deploy.errors import ModelError
from tc_deploy.models.family import Block, Branch, Family, SelfAttention
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.rows import Rows

TEXT_TOKENS = 77 + 256
"""CLIP's and T5's embeddings, one behind the other."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    grid = token_grid(size, patch)
    if max(grid) > config.pos_embed_max_size:
        raise ModelError(
            f"latent size: this checkpoint has positions for {config.pos_embed_max_size} patches along an axis, found"
            f" {max(grid)}; choose smaller latents"
        )
    text = text_length(options, TEXT_TOKENS)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels or config.in_channels,
        conditions=(
            Condition(name="encoder_hidden_states", dtype="float32", shape=(text, config.joint_attention_dim)),
            Condition(name="pooled_projections", dtype="float32", shape=(config.pooled_projection_dim,)),
        ),
        text_tokens=text,
    )


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    channels, made = config.get("in_channels", 16), config.get("out_channels", 16)
    return None if made in (None, channels) else f"{channels} channels in and {made} out (control or inpainting)"


FAMILY = Family(
    model_class="SD3Transformer2DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states"),
            takes=Rows.IMAGE_AND_TEXT,
            gives=Rows.TEXT_AND_IMAGE,
            entries=("norm1", "norm2"),
            branches=(
                Branch(name="attention", exit="attn", rows=Rows.IMAGE_AND_TEXT),
                Branch(name="dual_attention", exit="attn2", optional=True),
                Branch(name="mlp", exit="ff"),
                # The last block drops its text.
                Branch(name="mlp", exit="ff_context", rows=Rows.TEXT, optional=True),
            ),
            attentions=(
                SelfAttention(module="attn", keys=Rows.IMAGE_TEXT),
                SelfAttention(module="attn2", prefix="dual_", optional=True),
            ),
        ),
    ),
    geometry=_geometry,
    check=_check,
)
