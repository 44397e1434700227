"""A transformer that is not in diffusers, made known to tc-deploy: docs/adapters.md explains it line by line.

A small U-ViT (Bao et al., arXiv 2209.12152): time and label stand among the tokens, and long skip connections tie the
first blocks to the last. ``python examples/uvit.py FOLDER`` makes a random checkpoint and a bundle of it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from safetensors.torch import save_file
from torch import Tensor, nn

from tc_deploy.models.family import Block, Branch, Family, SelfAttention
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, Values, latent_size, token_grid
from tc_deploy.models.loading import register_family
from tc_deploy.models.rows import Rows

PREFIX = 2
"""Tokens before the picture's: time and label."""


# ------------------------------------------------------------------------------------------------- the model, as it is
class SelfAttentionLayer(nn.Module):
    """Multi-head attention of all tokens to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed: Tensor = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class UViTBlock(nn.Module):
    """A transformer block; those of the second half first merge what a block of the first half left."""

    def __init__(self, width: int, heads: int, *, skip: bool) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttentionLayer(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, tokens, width) to the same."""
        if self.merge is not None:
            assert skip is not None
            x = self.merge(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        merged: Tensor = x + self.mlp(self.norm2(x))
        return merged


class UViT(nn.Module):
    """Noise, time and label to the model's output."""

    def __init__(
        self, size: tuple[int, int], patch: int, channels: int, width: int, heads: int, depth: int, classes: int
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.grid = (size[0] // patch, size[1] // patch)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.label = nn.Embedding(classes + 1, width)
        self.positions = nn.Parameter(torch.zeros(1, PREFIX + math.prod(self.grid), width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, skip=False) for _ in range(depth))
        self.mid_blocks = nn.ModuleList([UViTBlock(width, heads, skip=False)])
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch * patch * channels)

    def forward(self, latents: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B,) to (B, C, H, W)."""
        angles = time[:, None] * torch.exp(torch.linspace(0, -9, self.width // 2, device=time.device))
        prefix = torch.stack([torch.cat([angles.sin(), angles.cos()], dim=1), self.label(label)], dim=1)
        patches = self.embed(latents).flatten(2).transpose(1, 2)
        x = torch.cat([prefix, patches], dim=1) + self.positions
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        for block in self.mid_blocks:
            x = block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.head(self.norm(x[:, PREFIX:]))
        x = x.reshape(x.shape[0], *self.grid, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------------- what the method must know
def build(config: Mapping[str, Any]) -> nn.Module:
    return UViT(**{key: value for key, value in config.items() if not key.startswith("_")})


def _geometry(module: Any, options: ModelOptions) -> Geometry:
    size = tuple(axis * module.patch for axis in module.grid)
    grid = token_grid(latent_size(options, size, (module.patch,) * 2), (module.patch,) * 2)
    channels, classes = module.embed.in_channels, module.label.num_embeddings - 1
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=module.width,
        latent_shape=(channels, *size),
        output_channels=channels,
        conditions=(Condition(name="label", dtype="int32", shape=(), classes=classes, values=Values.LABEL),),
        text_tokens=PREFIX,
    )


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:  # noqa: ARG001
    output: Tensor = module(inputs["hidden_states"], inputs["timestep"], inputs["label"])
    return output


def _blocks(modules: str, per_token: tuple[str, ...] = ()) -> Block:
    together = Rows.TEXT_IMAGE
    return Block(
        modules=modules,
        arguments=("x",),
        takes=together,
        gives=together,
        entries=("norm1", "norm2"),
        entry_rows=together,
        branches=(Branch(name="attention", exit="attn", rows=together), Branch(name="mlp", exit="mlp", rows=together)),
        attentions=(SelfAttention(module="attn", keys=together),),
        per_token=per_token,
    )


FAMILY = Family(
    model_class="UViT",
    blocks=(_blocks("in_blocks"), _blocks("mid_blocks"), _blocks("out_blocks", per_token=("skip",))),
    geometry=_geometry,
    call=_call,
    build=build,
)
register_family(FAMILY)

CONFIG = {
    "_class_name": "UViT",
    "size": [8, 12],
    "patch": 2,
    "channels": 4,
    "width": 32,
    "heads": 2,
    "depth": 1,
    "classes": 10,
}


def save(folder: Path, module: nn.Module) -> Path:
    """Write a checkpoint as tc-deploy reads it: a configuration that names the class, and safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(module.state_dict(), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def main(folder: Path) -> None:
    """Make a random checkpoint, a plan and a bundle of it."""
    import diffusers

    from tc_deploy.calibrate.calibration import calibrate
    from tc_deploy.calibrate.recipe import Recipe
    from tc_deploy.export.bundle_export import export_bundle

    model = save(folder / "model", build(CONFIG))
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(model / "scheduler")
    settings = {
        "sampling": {"num_inference_steps": 10},
        "cache": {"keep_counts": ((8,), (0,))},
        "measure": {"samples": 0},
    }
    calibrate(Recipe.model_validate({"model": str(model), **settings}), folder / "plan")
    export_bundle(folder / "plan", folder / "bundle")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
