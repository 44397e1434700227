"""Wan, text to video (``WanTransformer3DModel``): tokens over frames, rows and columns, prompt by cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tc_deploy.errors import UsageError
from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.scaling import by_moments
from tc_deploy.models.text import TextEncoding, TextPart, last_states, prompt_tokens
from tc_deploy.types import Cleaning

TEXT_TOKENS = 512
LATENT_SIZE = (21, 60, 104)
"""81 frames of 480 x 832 pixels."""
DENSE_CHANNELS = 48
DENSE_LATENT_SIZE = (31, 44, 80)
"""121 frames of 704 x 1280 pixels, for the autoencoder of Wan 2.2 TI2V-5B, whose latents have so many channels."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    default = DENSE_LATENT_SIZE if config.in_channels == DENSE_CHANNELS else LATENT_SIZE
    size = latent_size(options, default, config.patch_size)
    grid = token_grid(size, config.patch_size)
    text = text_length(options, TEXT_TOKENS)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.out_channels or config.in_channels,
        conditions=(Condition(name="encoder_hidden_states", dtype="float32", shape=(text, config.text_dim)),),
        text_tokens=text,
    )


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            return f"image embeddings ({key} {config[key]}, image to video)"
    channels, made = config.get("in_channels", 16), config.get("out_channels", 16)
    if made not in (None, channels):
        return f"{channels} channels in and {made} out (image to video)"
    if pipeline.get("boundary_ratio") is not None:
        return "two transformers that take turns (boundary_ratio, as in Wan 2.2 A14B)"
    return None


def _received(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """A timestep per sample, where the pipeline names one per token, as Wan 2.2 TI2V's does.

    From text alone all tokens of a sample are at the same.

    Raises:
        UsageError: they are not.
    """
    timestep = arguments.get("timestep")
    if not isinstance(timestep, Tensor) or timestep.ndim != 2:
        return arguments
    first = timestep[:, :1]
    if not bool((timestep == first).all()):
        raise UsageError(
            "timestep: expected one for all tokens, as in text to video, found several, as in image to video, which"
            " engines do not do"
        )
    return {**arguments, "timestep": first.squeeze(1)}


def _conditions(made: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:  # noqa: ARG001
    # What stands behind the prompt is zeros, whatever the encoder made of the padding.
    states, mask = made["text_encoder.states"], made["attention_mask"]
    return {"encoder_hidden_states": states * mask.to(states.dtype).unsqueeze(-1)}


TEXT = TextEncoding(
    parts=(
        TextPart(
            encoder="text_encoder",
            tokenizer="tokenizer",
            model_class="UMT5EncoderModel",
            tokens=prompt_tokens,
            encode=last_states,
            outputs=("states",),
            masked=True,
        ),
    ),
    join=_conditions,
    cleaning=Cleaning.WEB,
)

FAMILY = Family(
    model_class="WanTransformer3DModel",
    blocks=(
        Block(
            modules="blocks",
            entries=("norm1", "norm2", "norm3"),
            branches=(
                Branch(name="attention", exit="attn1"),
                Branch(name="cross_attention", exit="attn2"),
                Branch(name="mlp", exit="ffn"),
            ),
            attentions=(SelfAttention(module="attn1", rotary=Rotary(argument="rotary_emb", axis=1)),),
        ),
    ),
    geometry=_geometry,
    unscaled=by_moments,
    convention=Convention(pipelines=("WanPipeline",), scheduler_has=("set_begin_index", "sigmas")),
    check=_check,
    received=_received,
    text=TEXT,
)
