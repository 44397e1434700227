"""AuraFlow (``AuraFlowTransformer2DModel``): double, then single blocks; learned register tokens stand in the text."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, SelfAttention
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.packed import embedding
from tc_deploy.models.rows import Rows
from tc_deploy.models.scaling import by_factor

TEXT_TOKENS = 256


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    grid = token_grid(size, patch)
    text = text_length(options, TEXT_TOKENS)
    registers: Any = module.register_tokens
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels,
        conditions=(embedding("encoder_hidden_states", text, config.joint_attention_dim),),
        text_tokens=text + registers.shape[1],
    )


FAMILY = Family(
    model_class="AuraFlowTransformer2DModel",
    blocks=(
        Block(
            modules="joint_transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states"),
            takes=Rows.IMAGE_AND_TEXT,
            gives=Rows.TEXT_AND_IMAGE,
            entries=("norm1", "norm2"),
            branches=(
                Branch(name="attention", exit="attn", rows=Rows.IMAGE_AND_TEXT),
                Branch(name="mlp", exit="ff"),
                Branch(name="mlp", exit="ff_context", rows=Rows.TEXT),
            ),
            attentions=(SelfAttention(module="attn", keys=Rows.TEXT_IMAGE),),
        ),
        Block(
            modules="single_transformer_blocks",
            takes=Rows.TEXT_IMAGE,
            gives=Rows.TEXT_IMAGE,
            entries=("norm1", "norm2"),
            entry_rows=Rows.TEXT_IMAGE,
            branches=(
                Branch(name="attention", exit="attn", rows=Rows.TEXT_IMAGE),
                Branch(name="mlp", exit="ff", rows=Rows.TEXT_IMAGE),
            ),
            attentions=(SelfAttention(module="attn", keys=Rows.TEXT_IMAGE),),
        ),
    ),
    geometry=_geometry,
    convention=Convention(pipelines=("AuraFlowPipeline",), scheduler_has=("set_begin_index",), timestep_divisor=1000.0),
    unscaled=by_factor,
)
