"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tc_deploy.plan import RANDOM


class ModelPath(click.Path):
    """A folder, or a hub's ``owner/name``. What begins with a dot means a folder, so it cannot be taken for an id."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As click does for a path."""
        path = Path(str(super().convert(value, param, ctx)))
        return path.absolute() if str(value).startswith(".") and not path.exists() else path


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:  # noqa: ARG001
    if value is None:
        return None
    try:
        return [int(number) for number in value.split("x")]
    except ValueError:
        raise click.BadParameter(f"expected numbers with x between them, like 128x96, found {value}") from None


size_option = click.option(
    "--latent-size",
    metavar="HxW|FxHxW",
    callback=_size,
    help="Of the latents, for video with frames; without it the model's own.",
)
text_option = click.option("--text-tokens", type=int, help="Tokens per prompt; without it the family's default.")
conditions_option = click.option(
    "--conditions",
    metavar=f"FILE|{RANDOM}",
    help="What a model with prompts is sampled on: embeddings, as examples/encode_prompts.py writes them, or"
    f" {RANDOM} draws for a trial.",
)
variant_option = click.option(
    "--variant", metavar="NAME", help="Which copy of the weights, as fp16 of diffusion_pytorch_model.fp16.safetensors."
)
force_option = click.option(
    "--force", is_flag=True, help="Replace a file at -o that tc-deploy did not write; never one that is read."
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where PyTorch runs the model.",
)
guidance_option = click.option(
    "--guidance-scale",
    "sampling__guidance_scale",
    type=float,
    help="Classifier-free guidance; without it, or at 1 and less, runs are unguided. For FLUX the strength of the"
    " distilled guidance.",
)
true_cfg_option = click.option(
    "--true-cfg-scale", "sampling__true_cfg_scale", type=float, help="For FLUX: classifier-free guidance."
)
