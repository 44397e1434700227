"""Z-Image (``ZImageTransformer2DModel``): lists as inputs, picture refiners, then blocks over picture and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.convention import Convention, Shift, single_flow_sigmas
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, text_length, token_grid
from tc_deploy.models.packed import LATENT_SIZE, embedding
from tc_deploy.models.rows import Rows
from tc_deploy.types import GuidanceRule

TEXT_TOKENS = 512
MULTIPLE = 32
"""Captions and pictures are padded to a multiple of so many tokens."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.all_patch_size[0],) * 2
    size = latent_size(options, LATENT_SIZE, patch)
    grid = token_grid(size, patch)
    text = text_length(options, TEXT_TOKENS)
    for what, found in (("latent size: tokens", math.prod(grid)), ("text tokens", text)):
        if found % MULTIPLE:
            raise ModelError(
                f"{what}: {type(module).__name__} pads them to a multiple of {MULTIPLE}, expected one, found {found};"
                " choose another"
            )
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.dim,
        latent_shape=(config.in_channels, *size),
        output_channels=config.in_channels,
        conditions=(embedding("cap_feats", text, config.cap_feat_dim),),
        text_tokens=text,
    )


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:  # noqa: ARG001
    images = list(inputs["hidden_states"].unsqueeze(2).unbind(0))
    time = (1000 - inputs["timestep"]) / 1000
    output = module(x=images, t=time, cap_feats=list(inputs["cap_feats"].unbind(0)), return_dict=False)[0]
    # Its pipeline takes the output's opposite.
    return -torch.stack(output).squeeze(2)


def _received(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline calls the model with, as :func:`_call` was given it."""
    others = {name: value for name, value in arguments.items() if name not in ("x", "t", "cap_feats")}
    images, captions = (arguments[name] for name in ("x", "cap_feats"))
    lengths = {len(caption) for caption in captions}
    if len(lengths) > 1:
        found = ", ".join(map(str, sorted(lengths)))
        raise UsageError(
            f"cap_feats: expected prompts of one length, found {found} tokens; run them one by one, or pad their texts"
        )
    given = {"hidden_states": torch.stack(list(images)).squeeze(2), "cap_feats": torch.stack(list(captions))}
    return {**others, **given, "timestep": arguments["t"]}


def _returned(sample: Tensor) -> list[Tensor]:
    return list((-sample).unsqueeze(2).unbind(0))


def _block(modules: str, rows: Rows) -> Block:
    return Block(
        modules=modules,
        arguments=("x",),
        takes=rows,
        gives=rows,
        entries=("attention_norm1", "ffn_norm1"),
        entry_rows=rows,
        # A norm stands behind each branch too.
        branches=(
            Branch(name="attention", exit="attention_norm2", rows=rows),
            Branch(name="mlp", exit="ffn_norm2", rows=rows),
        ),
        attentions=(
            SelfAttention(module="attention", keys=rows, rotary=Rotary(argument="freqs_cis", axis=1, rows=rows)),
        ),
    )


def _check(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:  # noqa: ARG001
    if config.get("siglip_feat_dim") is not None:
        return "image features (siglip_feat_dim, Omni)"
    patches = config.get("all_patch_size", (2,))
    return None if list(patches) == [2] else f"patch sizes {list(patches)}"


FAMILY = Family(
    model_class="ZImageTransformer2DModel",
    blocks=(_block("noise_refiner", Rows.IMAGE), _block("layers", Rows.IMAGE_TEXT)),
    geometry=_geometry,
    check=_check,
    call=_call,
    received=_received,
    returned=_returned,
    convention=Convention(
        pipelines=("ZImagePipeline",),
        sigmas=single_flow_sigmas,
        shift=Shift.ALWAYS,
        scheduler_has=("set_begin_index",),
        guidance=GuidanceRule.BEYOND,
    ),
)
