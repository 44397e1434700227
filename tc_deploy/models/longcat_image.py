"""LongCat-Image (``LongCatImageTransformer2DModel``): FLUX.1's layout, modulated by the timestep alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.models import flux
from tc_deploy.models.convention import Convention, Shift, flow_sigmas
from tc_deploy.models.family import Family, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.packed import packed_geometry, positions, unpacked
from tc_deploy.types import GuidanceRule

TEXT_TOKENS = 512
"""Also the picture's first row and column, whatever the prompt's length."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    return packed_geometry(module.config, options, TEXT_TOKENS, ())


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    device = inputs["hidden_states"].device
    number = torch.arange(geometry.text_tokens, dtype=torch.float32, device=device)
    given = {
        "img_ids": positions(geometry.grid, (1, TEXT_TOKENS, TEXT_TOKENS), device),
        "txt_ids": torch.stack([torch.zeros_like(number), number, number], dim=-1),
    }
    return call_diffusers(module, {**inputs, **given}, geometry)


FAMILY = Family(
    model_class="LongCatImageTransformer2DModel",
    blocks=flux.FAMILY.blocks,
    geometry=_geometry,
    call=_call,
    convention=Convention(
        pipelines=("LongCatImagePipeline",),
        sigmas=flow_sigmas,
        shift=Shift.ALWAYS,
        timestep_divisor=1000.0,
        guidance=GuidanceRule.RESCALED_DOWN,
    ),
    unpacked=unpacked,
)
