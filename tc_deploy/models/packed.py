"""Latents whose pixels, 2 by 2, are the channels of one token, as FLUX's pipelines and their like pack them.

In: a size. Out: the geometry of a model that takes packed latents, the positions of its tokens, and latents unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tc_deploy.conditions import GUIDANCE
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, Values, latent_size, text_length, token_grid

LATENT_SIZE = (128, 128)
PACKING = (2, 2)
"""The pipelines pack 2 x 2 latents into the channels of one token."""


def embedding(name: str, *shape: int) -> Condition:
    """A condition that holds embeddings."""
    return Condition(name=name, dtype="float32", shape=shape)


def mask(name: str, text: int) -> Condition:
    """A condition that says which prompt tokens count."""
    return Condition(name=name, dtype="float32", shape=(text,), values=Values.MASK)


def guidance() -> Condition:
    """The strength that a guidance-distilled model is told."""
    return Condition(name=GUIDANCE, dtype="float32", shape=(), values=Values.GUIDANCE)


def packed_geometry(config: Any, options: ModelOptions, text_tokens: int, conditions: Sequence[Condition]) -> Geometry:
    """Sizes of a model that takes packed latents.

    Args:
        config: the module's.
        options: may name the size of the latents before they are packed, and the prompt's length.
        text_tokens: prompt embeddings where the options name no number.
        conditions: beside ``encoder_hidden_states``.

    Raises:
        ModelError: the options do not fit.
    """
    grid = token_grid(latent_size(options, LATENT_SIZE, PACKING), PACKING)
    tokens, text = math.prod(grid), text_length(options, text_tokens)
    return Geometry(
        grid=grid,
        tokens=tokens,
        width=config.num_attention_heads * config.attention_head_dim,
        latent_shape=(tokens, config.in_channels),
        output_channels=tokens,
        conditions=(embedding("encoder_hidden_states", text, config.joint_attention_dim), *conditions),
        text_tokens=text,
    )


def positions(grid: tuple[int, ...], first: tuple[int, int, int], device: torch.device) -> Tensor:
    """(N, 3) of a grid of tokens: a kind, a row and a column, each from ``first`` on."""
    rows, columns = (torch.arange(axis, dtype=torch.float32, device=device) for axis in grid)
    kind = torch.zeros(1, device=device)
    axes = (axis + start for axis, start in zip((kind, rows, columns), first, strict=True))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def unpacked(latents: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, 4 C) to (B, C, H, W): each token's channels are C times 2 x 2 latents."""
    rows, columns = geometry.grid
    latents = latents.reshape(latents.shape[0], rows, columns, -1, *PACKING)  # (B, H/2, W/2, C, 2, 2)
    latents = latents.permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(latents.shape[0], -1, rows * PACKING[0], columns * PACKING[1])
