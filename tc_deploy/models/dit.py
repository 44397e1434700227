"""DiT, class-conditional (``DiTTransformer2DModel``): adaLN-Zero blocks over square latents."""

from __future__ import annotations

from typing import Any

from torch import nn

from tc_deploy.models.family import Branch, Condition, Family, Geometry


def _geometry(module: nn.Module) -> Geometry:
    config: Any = module.config
    side = config.sample_size
    return Geometry(
        tokens=(side // config.patch_size) ** 2,
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, side, side),
        output_channels=config.out_channels or config.in_channels,
        conditions=(Condition(name="class_labels", dtype="int32", shape=(), classes=config.num_embeds_ada_norm),),
    )


FAMILY = Family(
    model_class="DiTTransformer2DModel",
    block_lists=("transformer_blocks",),
    branches=(
        Branch(name="attention", entry="norm1", exit="attn1"),
        Branch(name="mlp", entry="norm3", exit="ff"),
    ),
    self_attention="attn1",
    geometry=_geometry,
)
