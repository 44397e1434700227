"""Chroma (``ChromaTransformer2DModel``): FLUX.1's layout; one approximator of the timestep modulates every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.models.convention import Convention, Shift, flow_sigmas
from tc_deploy.models.family import Block, Branch, Family, call_diffusers
from tc_deploy.models.flux import ATTENTION, DOUBLE_BLOCK
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.packed import mask, packed_geometry, positions, unpacked
from tc_deploy.models.rows import Rows

TEXT_TOKENS = 512
MASK = "attention_mask"


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    return packed_geometry(module.config, options, TEXT_TOKENS, (mask(MASK, options.text_tokens or TEXT_TOKENS),))


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    latents = inputs["hidden_states"]
    shown = torch.ones(latents.shape[:2], device=latents.device)
    given = {
        # Numbers, as the pipeline gives them: they are added to the scores.
        "attention_mask": torch.cat([inputs[MASK], shown], dim=1),
        "img_ids": positions(geometry.grid, (0, 0, 0), latents.device),
        "txt_ids": torch.zeros(geometry.text_tokens, 3, device=latents.device),
    }
    return call_diffusers(module, {**inputs, **given}, geometry)


def _received(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's mask shows the picture's tokens too."""
    shown = arguments.get(MASK)
    if shown is None:
        return dict(arguments)
    return {**arguments, MASK: shown[:, : shown.shape[1] - arguments["hidden_states"].shape[1]]}


FAMILY = Family(
    model_class="ChromaTransformer2DModel",
    blocks=(
        DOUBLE_BLOCK,
        Block(
            modules="single_transformer_blocks",
            takes=Rows.TEXT_IMAGE,
            gives=Rows.TEXT_IMAGE,
            entries=("norm",),
            entry_rows=Rows.TEXT_IMAGE,
            branches=(Branch(name="parallel", exit="proj_out", rows=Rows.TEXT_IMAGE),),
            attentions=(ATTENTION,),
        ),
    ),
    geometry=_geometry,
    call=_call,
    received=_received,
    convention=Convention(
        pipelines=("ChromaPipeline",),
        sigmas=flow_sigmas,
        shift=Shift.ALWAYS,
        scheduler_has=("set_begin_index",),
        timestep_divisor=1000.0,
    ),
    unpacked=unpacked,
)
