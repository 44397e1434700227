"""FLUX.1 (``FluxTransformer2DModel``): double blocks that attend jointly, then single blocks over text and image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.conditions import GUIDANCE
from tc_deploy.models.convention import Convention, Shift, flow_sigmas_unless_own
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.packed import embedding, guidance, packed_geometry, positions, unpacked
from tc_deploy.models.rows import Rows
from tc_deploy.models.text import TextEncoding, TextPart, last_states, own_tokens, pooled, prompt_tokens

TEXT_TOKENS = 512
CONVENTION = Convention(
    pipelines=("FluxPipeline",),
    sigmas=flow_sigmas_unless_own,
    shift=Shift.ALWAYS,
    scheduler_has=("set_begin_index",),
    timestep_divisor=1000.0,
    embedded_guidance=3.5,
    true_cfg=True,
)


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    told = (guidance(),) if config.guidance_embeds else ()
    conditions = (embedding("pooled_projections", config.pooled_projection_dim), *told)
    return packed_geometry(config, options, TEXT_TOKENS, conditions)


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    device = inputs["hidden_states"].device
    image = positions(geometry.grid, (0, 0, 0), device)
    text = torch.zeros(geometry.text_tokens, 3, device=device)
    return call_diffusers(module, {**inputs, "img_ids": image, "txt_ids": text}, geometry)


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    channels, made = config.get("in_channels", 64), config.get("out_channels")
    return None if made in (None, channels) else f"{channels} channels in and {made} out (fill, canny, depth)"


def _conditions(made: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:  # noqa: ARG001
    return {
        "encoder_hidden_states": made["text_encoder_2.states"],
        "pooled_projections": made["text_encoder.pooled"],
    }


TEXT = TextEncoding(
    parts=(
        TextPart(
            encoder="text_encoder",
            tokenizer="tokenizer",
            model_class="CLIPTextModel",
            tokens=own_tokens,
            encode=pooled,
            outputs=("pooled",),
        ),
        TextPart(
            encoder="text_encoder_2",
            tokenizer="tokenizer_2",
            model_class="T5EncoderModel",
            tokens=prompt_tokens,
            encode=last_states,
            outputs=("states",),
        ),
    ),
    join=_conditions,
    defaults={GUIDANCE: 3.5},
)

_ROTARY = Rotary(argument="image_rotary_emb", axis=0, rows=Rows.TEXT_IMAGE)
ATTENTION = SelfAttention(module="attn", keys=Rows.TEXT_IMAGE, rotary=_ROTARY)
_STREAMS: dict[str, Any] = {
    "arguments": ("hidden_states", "encoder_hidden_states"),
    "takes": Rows.IMAGE_AND_TEXT,
    "gives": Rows.TEXT_AND_IMAGE,
    "attentions": (ATTENTION,),
}
DOUBLE_BLOCK = Block(
    modules="transformer_blocks",
    entries=("norm1", "norm2"),
    branches=(
        Branch(name="attention", exit="attn", rows=Rows.IMAGE_AND_TEXT),
        Branch(name="mlp", exit="ff"),
        Branch(name="mlp", exit="ff_context", rows=Rows.TEXT),
    ),
    **_STREAMS,
)
"""Picture and text side by side, as FLUX.2 and Chroma have it too."""

FAMILY = Family(
    model_class="FluxTransformer2DModel",
    blocks=(
        DOUBLE_BLOCK,
        Block(
            modules="single_transformer_blocks",
            entries=("norm",),
            entry_rows=Rows.TEXT_IMAGE,
            # Attention and MLP side by side, one projection and one gate for both.
            branches=(Branch(name="parallel", exit="proj_out", rows=Rows.TEXT_IMAGE),),
            **_STREAMS,
        ),
    ),
    geometry=_geometry,
    check=_check,
    call=_call,
    convention=CONVENTION,
    text=TEXT,
    unpacked=unpacked,
)
