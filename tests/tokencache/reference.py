"""A DiT with token caching, written out by hand: what the package's cached forward is compared with.

It takes the weights from the model's submodules and shares nothing else with the package. Where the package gathers
tokens and writes them back, this computes every token and chooses by a mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Noted = list[dict[str, Tensor]]
"""Per block: ``attention``, ``mlp`` and ``block`` (B, N, D), ``key`` and ``value``, all (B, N, D)."""


def step(
    module: Any,
    inputs: Mapping[str, Tensor],
    kept: Sequence[Tensor] | None = None,
    cached: Noted | None = None,
    *,
    residual: bool = False,
    keys: bool = False,
) -> tuple[Tensor, Noted]:
    """One step of the model.

    Args:
        module: diffusers' DiT.
        inputs: its inputs.
        kept: per block (B, N), true where a token is computed; None computes all.
        cached: per block what the other tokens take.
        residual: they take the block's residual, not the branches before their gates.
        keys: kept tokens see the others' cached keys and values; otherwise only each other.

    Returns:
        The output and what was computed.
    """
    timestep, labels = inputs["timestep"], inputs["class_labels"].long()
    tokens = module.pos_embed(inputs["hidden_states"])  # (B, N, D)
    everything: Noted = []
    for number, block in enumerate(module.transformer_blocks):
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if kept is None else kept[number]
        old = {} if cached is None else cached[number]
        conditioning = silu(block.norm1.emb(timestep, labels, hidden_dtype=tokens.dtype))
        parts = block.norm1.linear(conditioning)[:, None].chunk(6, dim=2)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts  # (B, 1, D)
        new: dict[str, Tensor] = {}

        normed = _layer_norm(tokens, block.norm1.norm.eps) * (1 + scale_attention) + shift_attention
        new["key"], new["value"] = block.attn1.to_k(normed), block.attn1.to_v(normed)
        new["attention"] = _attention(block.attn1, normed, new, mask, old if keys else None)
        attended = new["attention"]
        if cached is not None and not residual:
            attended = torch.where(mask[..., None], attended, old["attention"])
        middle = tokens + gate_attention * attended

        new["mlp"] = block.ff(_layer_norm(middle, block.norm3.eps) * (1 + scale_mlp) + shift_mlp)
        fed = new["mlp"]
        if cached is not None and not residual:
            fed = torch.where(mask[..., None], fed, old["mlp"])
        after = middle + gate_mlp * fed

        new["block"] = after - tokens
        if cached is not None and residual:
            after = tokens + torch.where(mask[..., None], new["block"], old["block"])
        tokens = after
        everything.append(new)
    return head(module, tokens, inputs), everything


def head(module: Any, tokens: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """What stands behind the last block: (B, N, D) to (B, output channels, H, W)."""
    embedding = module.transformer_blocks[0].norm1.emb
    conditioning = embedding(inputs["timestep"], inputs["class_labels"].long(), hidden_dtype=tokens.dtype)
    shift, scale = module.proj_out_1(silu(conditioning))[:, None].chunk(2, dim=2)
    patches = module.proj_out_2(
        _layer_norm(tokens, module.norm_out.eps) * (1 + scale) + shift
    )  # (B, N, patch * patch * C)
    side, patch = round(tokens.shape[1] ** 0.5), module.config.patch_size
    patches = patches.reshape(-1, side, side, patch, patch, module.out_channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, module.out_channels, side * patch, side * patch)


def combined(history: Sequence[Noted], weights: Tensor) -> Noted:
    """Extrapolate: the sum of what the last full steps noted, latest first, by ``weights`` (B, len(history))."""

    def total(block: int, part: str) -> Tensor:
        terms = [noted[block][part] for noted in history]
        shape = (-1, *(1,) * (terms[0].ndim - 1))
        return sum((weights[:, age].reshape(shape) * term for age, term in enumerate(terms)), torch.zeros(()))

    return [{part: total(block, part) for part in history[0][block]} for block in range(len(history[0]))]


def _layer_norm(tokens: Tensor, eps: float) -> Tensor:
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def _heads(attention: Any, tokens: Tensor) -> Tensor:
    return tokens.unflatten(2, (attention.heads, -1)).transpose(1, 2)


def _attention(
    attention: Any, tokens: Tensor, new: Mapping[str, Tensor], mask: Tensor, old: Mapping[str, Tensor] | None
) -> Tensor:
    query = _heads(attention, attention.to_q(tokens))
    key, value = new["key"], new["value"]
    if old:
        here = mask[..., None]
        key, value = torch.where(here, key, old["key"]), torch.where(here, value, old["value"])
    key, value = _heads(attention, key), _heads(attention, value)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5  # (B, heads, N, N)
    if old is None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    # A block that keeps no token has no row to compute; what stands there is never taken.
    mixed = scores.softmax(dim=3).nan_to_num() @ value
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))
