"""Stable Diffusion 3 and 3.5 (``SD3Transformer2DModel``): image and text attend jointly; 3.5's first blocks twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tc_deploy.errors import ModelError
from tc_deploy.models.convention import Convention, Shift
from tc_deploy.models.family import Block, Branch, Family, SelfAttention
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.rows import Rows
from tc_deploy.models.text import TextEncoding, TextPart, last_states, own_tokens, penultimate_and_projected

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


def _conditions(made: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    clip = torch.cat([made["text_encoder.states"], made["text_encoder_2.states"]], dim=-1)
    length, width = geometry.conditions[0].shape
    clip = pad(clip, (0, width - clip.shape[-1]))
    t5 = made.get("text_encoder_3.states")
    if t5 is None:
        # A pipeline without T5 puts zeros in its place.
        t5 = clip.new_zeros(1, length - clip.shape[1], width).expand(clip.shape[0], -1, -1)
    return {
        "encoder_hidden_states": torch.cat([clip, t5], dim=-2),
        "pooled_projections": torch.cat([made["text_encoder.pooled"], made["text_encoder_2.pooled"]], dim=-1),
    }


def _clip(number: str) -> TextPart:
    return TextPart(
        encoder=f"text_encoder{number}",
        tokenizer=f"tokenizer{number}",
        model_class="CLIPTextModelWithProjection",
        tokens=own_tokens,
        encode=penultimate_and_projected,
        outputs=("states", "pooled"),
    )


TEXT = TextEncoding(
    parts=(
        _clip(""),
        _clip("_2"),
        TextPart(
            encoder="text_encoder_3",
            tokenizer="tokenizer_3",
            model_class="T5EncoderModel",
            tokens=lambda text_tokens, model_max_length: text_tokens - model_max_length,
            encode=last_states,
            outputs=("states",),
            optional=True,
        ),
    ),
    join=_conditions,
)

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
    convention=Convention(pipelines=("StableDiffusion3Pipeline",), shift=Shift.DYNAMIC, max_shift=1.16),
    check=_check,
    text=TEXT,
)
