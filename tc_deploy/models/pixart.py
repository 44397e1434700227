"""PixArt-alpha and PixArt-Sigma (``PixArtTransformer2DModel``): adaLN-single blocks that cross-attend to a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, SelfAttention, call_diffusers
from tc_deploy.models.geometry import (
    Condition,
    Geometry,
    ModelOptions,
    Values,
    latent_size,
    text_length,
    token_grid,
)
from tc_deploy.models.scaling import by_factor
from tc_deploy.models.text import TextEncoding, TextPart, last_states, prompt_tokens
from tc_deploy.types import Cleaning

ALPHA_TEXT_TOKENS, SIGMA_TEXT_TOKENS = 120, 300
AUTOENCODER_SCALE = 8
"""Pixels per latent, along an axis: alpha's 1024 models are told the picture's size in pixels."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    grid = token_grid(size, patch)
    # The prompt's length is not in the configuration; Sigma's says that sizes are no condition, alpha's says nothing.
    sigma = config.use_additional_conditions is False
    text = text_length(options, SIGMA_TEXT_TOKENS if sigma else ALPHA_TEXT_TOKENS)
    channels = config.caption_channels or config.cross_attention_dim
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels or config.in_channels,
        conditions=(
            Condition(name="encoder_hidden_states", dtype="float32", shape=(text, channels)),
            Condition(name="encoder_attention_mask", dtype="float32", shape=(text,), values=Values.MASK),
        ),
        text_tokens=text,
    )


def _call(module: Any, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if module.use_additional_conditions:
        # Constants of the token grid, so no inputs.
        batch, device = inputs["hidden_states"].shape[0], inputs["hidden_states"].device
        height, width = (AUTOENCODER_SCALE * axis for axis in geometry.latent_shape[1:])
        sizes = {
            "resolution": torch.tensor([[height, width]], dtype=torch.float32, device=device).expand(batch, -1),
            "aspect_ratio": torch.tensor([[height / width]], dtype=torch.float32, device=device).expand(batch, -1),
        }
    return call_diffusers(module, {**inputs, "added_cond_kwargs": sizes}, geometry)


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    if config.get("attention_type", "default") != "default":
        return f"GLIGEN (attention_type {config['attention_type']!r})"
    if config.get("cross_attention_dim", 1) is None:
        return "blocks without cross-attention (cross_attention_dim null)"
    return None


def _conditions(made: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:  # noqa: ARG001
    return {
        "encoder_hidden_states": made["text_encoder.states"],
        "encoder_attention_mask": made["attention_mask"].float(),
    }


TEXT = TextEncoding(
    parts=(
        TextPart(
            encoder="text_encoder",
            tokenizer="tokenizer",
            model_class="T5EncoderModel",
            tokens=prompt_tokens,
            encode=last_states,
            outputs=("states",),
            masked=True,
        ),
    ),
    join=_conditions,
    cleaning=Cleaning.LOWER,
)

FAMILY = Family(
    model_class="PixArtTransformer2DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            entries=("norm1", "attn2", "norm2"),
            branches=(
                Branch(name="attention", exit="attn1"),
                Branch(name="cross_attention", exit="attn2"),
                Branch(name="mlp", exit="ff"),
            ),
            attentions=(SelfAttention(module="attn1"),),
        ),
    ),
    geometry=_geometry,
    unscaled=by_factor,
    convention=Convention(pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"), scales_noise=True),
    check=_check,
    call=_call,
    text=TEXT,
)
