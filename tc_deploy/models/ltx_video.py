"""LTX-Video, text to video (``LTXVideoTransformer3DModel``): packed video latents, prompt by cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tc_deploy.models.convention import Convention, Shift, flow_sigmas
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.packed import embedding, mask

TEXT_TOKENS = 128
LATENT_SIZE = (21, 16, 22)
"""161 frames of 512 x 704 pixels."""
FRAMES_PER_LATENT, PIXELS_PER_LATENT, FRAME_RATE = 8, 32, 25
MASK = "encoder_attention_mask"


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    grid = token_grid(latent_size(options, LATENT_SIZE, patch), patch)
    tokens, text = math.prod(grid), text_length(options, TEXT_TOKENS)
    return Geometry(
        grid=grid,
        tokens=tokens,
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(tokens, config.in_channels),
        output_channels=tokens,
        conditions=(embedding("encoder_hidden_states", text, config.caption_channels), mask(MASK, text)),
        text_tokens=text,
    )


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    frames, rows, columns = geometry.grid
    scale = (FRAMES_PER_LATENT / FRAME_RATE, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
    given = {"num_frames": frames, "height": rows, "width": columns, "rope_interpolation_scale": scale}
    return call_diffusers(module, {**inputs, **given}, geometry)


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    patches = (config.get("patch_size", 1), config.get("patch_size_t", 1))
    return None if patches == (1, 1) else f"patches of {patches[1]} frames and {patches[0]} pixels"


def _unpacked(latents: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, C) to (B, C, F, H, W)."""
    return latents.transpose(1, 2).reshape(latents.shape[0], -1, *geometry.grid)


FAMILY = Family(
    model_class="LTXVideoTransformer3DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            entries=("norm1", "attn2", "norm2"),
            branches=(
                Branch(name="attention", exit="attn1"),
                Branch(name="cross_attention", exit="attn2"),
                Branch(name="mlp", exit="ff"),
            ),
            attentions=(SelfAttention(module="attn1", rotary=Rotary(argument="image_rotary_emb", axis=1)),),
        ),
    ),
    geometry=_geometry,
    check=_check,
    call=_call,
    convention=Convention(pipelines=("LTXPipeline",), sigmas=flow_sigmas, shift=Shift.ALWAYS),
    unpacked=_unpacked,
)
