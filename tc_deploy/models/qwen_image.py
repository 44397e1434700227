"""Qwen-Image (``QwenImageTransformer2DModel``): double blocks with a complex rotary table for each stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tc_deploy.models.convention import Convention, Shift, flow_sigmas
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.packed import mask, packed_geometry, unpacked
from tc_deploy.models.rows import Rows
from tc_deploy.models.scaling import by_moments
from tc_deploy.types import GuidanceRule

TEXT_TOKENS = 512
MASK = "encoder_hidden_states_mask"


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    text = options.text_tokens or TEXT_TOKENS
    return packed_geometry(module.config, options, TEXT_TOKENS, (mask(MASK, text),))


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    return call_diffusers(module, {**inputs, "img_shapes": [[(1, *geometry.grid)]]}, geometry)


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    others = {
        "guidance_embeds": "distilled guidance",
        "zero_cond_t": "a second modulation for reference images (editing)",
        "use_additional_t_cond": "a condition beside the timestep (layers)",
        "use_layer3d_rope": "positions of layers",
    }
    return next((f"{words} ({key})" for key, words in others.items() if config.get(key)), None)


FAMILY = Family(
    model_class="QwenImageTransformer2DModel",
    blocks=(
        Block(
            modules="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states"),
            takes=Rows.IMAGE_AND_TEXT,
            gives=Rows.TEXT_AND_IMAGE,
            entries=("img_norm1", "img_norm2"),
            branches=(
                Branch(name="attention", exit="attn", rows=Rows.IMAGE_AND_TEXT),
                Branch(name="mlp", exit="img_mlp"),
                Branch(name="mlp", exit="txt_mlp", rows=Rows.TEXT),
            ),
            attentions=(
                SelfAttention(
                    module="attn",
                    keys=Rows.TEXT_IMAGE,
                    rotary=Rotary(argument="image_rotary_emb", axis=0, rows=Rows.IMAGE_AND_TEXT),
                ),
            ),
        ),
    ),
    geometry=_geometry,
    check=_check,
    call=_call,
    convention=Convention(
        pipelines=("QwenImagePipeline",),
        sigmas=flow_sigmas,
        shift=Shift.ALWAYS,
        scheduler_has=("set_begin_index",),
        timestep_divisor=1000.0,
        guidance=GuidanceRule.RESCALED,
        true_cfg=True,
    ),
    unpacked=unpacked,
    unscaled=by_moments,
)
