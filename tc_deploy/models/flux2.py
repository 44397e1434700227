"""FLUX.2 (``Flux2Transformer2DModel``): double, then single blocks, modulated by what all of a kind share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.models.convention import Convention, Shift, empirical_shift, flow_sigmas_unless_own
from tc_deploy.models.family import Block, Branch, Family, call_diffusers
from tc_deploy.models.flux import ATTENTION, DOUBLE_BLOCK
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.packed import guidance, packed_geometry
from tc_deploy.models.rows import Rows

TEXT_TOKENS = 512
CONVENTION = Convention(
    pipelines=("Flux2Pipeline",),
    sigmas=flow_sigmas_unless_own,
    shift=Shift.ALWAYS,
    mu=empirical_shift,
    scheduler_has=("set_begin_index",),
    timestep_divisor=1000.0,
    embedded_guidance=4.0,
    true_cfg=True,
)


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    told = (guidance(),) if config.guidance_embeds else ()
    return packed_geometry(config, options, TEXT_TOKENS, told)


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    device = inputs["hidden_states"].device
    one, (rows, columns) = torch.arange(1, device=device), (torch.arange(a, device=device) for a in geometry.grid)
    image = torch.cartesian_prod(one, rows, columns, one)
    text = torch.cartesian_prod(one, one, one, torch.arange(geometry.text_tokens, device=device))
    return call_diffusers(module, {**inputs, "img_ids": image[None], "txt_ids": text[None]}, geometry)


def _unpacked(latents: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, C) to (B, C, rows, columns): the autoencoder itself takes 2 x 2 latents apart."""
    return latents.transpose(1, 2).reshape(latents.shape[0], -1, *geometry.grid)


FAMILY = Family(
    model_class="Flux2Transformer2DModel",
    blocks=(
        DOUBLE_BLOCK,
        Block(
            modules="single_transformer_blocks",
            takes=Rows.TEXT_IMAGE,
            gives=Rows.TEXT_IMAGE,
            entries=("norm",),
            entry_rows=Rows.TEXT_IMAGE,
            # Projections of attention and MLP are fused, so one module makes both.
            branches=(Branch(name="parallel", exit="attn", rows=Rows.TEXT_IMAGE),),
            attentions=(ATTENTION,),
        ),
    ),
    geometry=_geometry,
    call=_call,
    convention=CONVENTION,
    unpacked=_unpacked,
)
