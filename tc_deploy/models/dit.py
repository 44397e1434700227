"""DiT, class-conditional (``DiTTransformer2DModel``): adaLN-Zero blocks over square latents."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tc_deploy.errors import ModelError
from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, SelfAttention
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, Values, latent_size, token_grid
from tc_deploy.models.scaling import by_factor


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    if size[0] != size[1]:
        raise ModelError(f"latent size: the DiT class knows square latents only, found {size[0]}x{size[1]}; choose one")
    grid = token_grid(size, patch)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels or config.in_channels,
        conditions=(
            Condition(
                name="class_labels", dtype="int32", shape=(), classes=config.num_embeds_ada_norm, values=Values.LABEL
            ),
        ),
    )


FAMILY = Family(
    model_class="DiTTransformer2DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            entries=("norm1", "norm3"),
            branches=(Branch(name="attention", exit="attn1"), Branch(name="mlp", exit="ff")),
            attentions=(SelfAttention(module="attn1"),),
        ),
    ),
    geometry=_geometry,
    unscaled=by_factor,
    convention=Convention(pipelines=("DiTPipeline",)),
)
