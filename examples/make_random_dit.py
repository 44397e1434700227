"""Write a random-weight DiT of a published size, for benchmarks of export and engines: no download, no training.

Weights are drawn so that every gate and modulation matters (a freshly initialised DiT is the identity).

    python examples/make_random_dit.py S/2 -o /tmp/dit-s2
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
"""Blocks, heads and head width, from table 1 of the DiT paper (arXiv 2212.09748)."""


def random_dit(size: str, sample_size: int, seed: int = 0, device: str = "cpu") -> DiTTransformer2DModel:
    """A DiT of a published size; its weights depend on the seed and on the kind of device that draws them."""
    name, _, patch = size.partition("/")
    blocks, heads, head_width = SIZES[name]
    with torch.device(device):
        model = DiTTransformer2DModel(
            num_layers=blocks,
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=4,
            out_channels=8,
            sample_size=sample_size,
            patch_size=int(patch),
        )
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.6 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * scale)
    return model


@click.command()
@click.argument("size", type=click.Choice([f"{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--sample-size", default=32, show_default=True, help="Side of the latents; 32 is 256 pixels.")
@click.option("--seed", default=0, show_default=True)
def main(size: str, output: Path, sample_size: int, seed: int) -> None:
    """Write a DiT of SIZE to OUTPUT, as transformer/ and scheduler/."""
    model = random_dit(size, sample_size, seed)
    model.save_pretrained(output / "transformer")
    DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(output / "scheduler")
    click.echo(f"{output}: DiT-{size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
