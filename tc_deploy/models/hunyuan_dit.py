"""Hunyuan-DiT (``HunyuanDiT2DModel``): prompts by cross-attention, rotary queries there too, long skip connections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Block, Branch, Family, Rotary, SelfAttention, call_diffusers
from tc_deploy.models.geometry import Geometry, ModelOptions, latent_size, token_grid
from tc_deploy.models.packed import embedding, mask
from tc_deploy.models.regions import centred_region
from tc_deploy.models.scaling import by_factor

BASE_SIZE = 64
"""Latents along an axis of the picture that positions are scaled to."""
ORIGINAL_SIZE = (1024, 1024)
"""What the pipeline tells the model of a picture's origin, whatever it makes."""


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Any = module.config
    patch = (config.patch_size,) * 2
    size = latent_size(options, (config.sample_size,) * 2, patch)
    grid = token_grid(size, patch)
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=config.hidden_size,
        latent_shape=(config.in_channels, *size),
        output_channels=config.in_channels * (2 if config.learn_sigma else 1),
        conditions=(
            embedding("encoder_hidden_states", config.text_len, config.cross_attention_dim),
            mask("text_embedding_mask", config.text_len),
            embedding("encoder_hidden_states_t5", config.text_len_t5, config.cross_attention_dim_t5),
            mask("text_embedding_mask_t5", config.text_len_t5),
        ),
    )


def _call(module: Any, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    latents, config = inputs["hidden_states"], module.config
    batch, device = latents.shape[0], latents.device
    rows, columns = geometry.grid
    region = centred_region((rows, columns), (BASE_SIZE // config.patch_size,) * 2)
    width = config.hidden_size // config.num_attention_heads
    given: dict[str, Any] = {
        "image_rotary_emb": get_2d_rotary_pos_embed(width, region, geometry.grid, device=device, output_type="pt"),
        "image_meta_size": None,
        "style": None,
    }
    if config.use_style_cond_and_image_meta_size:
        pixels = [8 * axis for axis in geometry.latent_shape[1:]]
        sizes = torch.tensor([[*ORIGINAL_SIZE, *pixels, 0, 0]], dtype=torch.float32, device=device)
        given["image_meta_size"] = sizes.repeat(batch, 1)
        given["style"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return call_diffusers(module, {**inputs, **given}, geometry)


_TABLES = Rotary(argument="image_rotary_emb", axis=0)

FAMILY = Family(
    model_class="HunyuanDiT2DModel",
    blocks=(
        Block(
            modules="blocks",
            entries=("norm1", "norm2", "norm3"),
            branches=(
                Branch(name="attention", exit="attn1"),
                Branch(name="cross_attention", exit="attn2"),
                Branch(name="mlp", exit="ff"),
            ),
            attentions=(SelfAttention(module="attn1", rotary=_TABLES),),
            rotaries=(Rotary(argument="image_rotary_emb", axis=0, module="attn2"),),
            per_token=("skip",),
        ),
    ),
    geometry=_geometry,
    call=_call,
    convention=Convention(pipelines=("HunyuanDiTPipeline",), scales_noise=True),
    unscaled=by_factor,
)
