"""Encode prompts with a pipeline folder's own text encoders, into a file that calibrate, plan and generate take.

Loads tokenizers and text encoders only, neither the transformer nor the autoencoder. Writes the arrays under the names
that the family's transformer takes; what a guided run goes away from stands under ``unconditional.NAME``.

    python examples/encode_prompts.py path/to/pipeline -o prompts.safetensors "a cat on a mat" "a red bridge in fog"
    python examples/encode_prompts.py path/to/pipeline -o prompts.safetensors --prompts prompts.txt --text-tokens 120

Pipelines with a T5 of the slow kind want sentencepiece installed, Wan's wants ftfy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tc_deploy import __version__
from tc_deploy.bundle import check_output, write_output
from tc_deploy.bundle.marks import ARRAYS_FILE

Named = dict[str, Tensor | None]
"""By the transformer's argument."""


def encode_pixart(pipeline: Any, prompts: list[str], negative: str, tokens: int | None) -> tuple[Named, Named]:
    """PixArt-alpha reads 120 tokens, Sigma 300; the pipelines know."""
    length = {} if tokens is None else {"max_sequence_length": tokens}
    embeddings, mask, other, other_mask = pipeline.encode_prompt(prompts, negative_prompt=negative, **length)
    return (
        {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask},
        {"encoder_hidden_states": other, "encoder_attention_mask": other_mask},
    )


def encode_sd3(pipeline: Any, prompts: list[str], negative: str, tokens: int | None) -> tuple[Named, Named]:
    """CLIP's 77 tokens stand before T5's."""
    length = {} if tokens is None else {"max_sequence_length": tokens - pipeline.tokenizer_max_length}
    embeddings, other, pooled, other_pooled = pipeline.encode_prompt(
        prompts, prompts, prompts, negative_prompt=negative, **length
    )
    return (
        {"encoder_hidden_states": embeddings, "pooled_projections": pooled},
        {"encoder_hidden_states": other, "pooled_projections": other_pooled},
    )


def encode_flux(
    pipeline: Any, prompts: list[str], negative: str, tokens: int | None, strength: float | None
) -> tuple[Named, Named]:
    """The strength of the guidance that was distilled in is a condition like the prompt."""
    length = {} if tokens is None else {"max_sequence_length": tokens}
    halves: list[Named] = []
    for texts in (prompts, [negative]):
        embeddings, pooled, _ = pipeline.encode_prompt(texts, texts, **length)
        guidance = None if strength is None else torch.full((len(texts),), strength)
        halves.append({"encoder_hidden_states": embeddings, "pooled_projections": pooled, "guidance": guidance})
    return halves[0], halves[1]


def encode_wan(pipeline: Any, prompts: list[str], negative: str, tokens: int | None) -> tuple[Named, Named]:
    """Wan's pipeline reads 512 tokens, more than its encode_prompt does unasked."""
    embeddings, other = pipeline.encode_prompt(prompts, [negative] * len(prompts), max_sequence_length=tokens or 512)
    return {"encoder_hidden_states": embeddings}, {"encoder_hidden_states": other}


ENCODERS = {
    "PixArtAlphaPipeline": encode_pixart,
    "PixArtSigmaPipeline": encode_pixart,
    "StableDiffusion3Pipeline": encode_sd3,
    "FluxPipeline": encode_flux,
    "WanPipeline": encode_wan,
}


@torch.no_grad()
def encoded(
    pipeline: Any, prompts: list[str], negative: str = "", tokens: int | None = None, strength: float | None = None
) -> dict[str, Tensor]:
    """Arrays by name, (n, ...) float32; the unconditional half is the same for all prompts and stands there once."""
    kind = type(pipeline).__name__
    if kind not in ENCODERS:
        raise click.ClickException(f"{kind} is not known here; known: {', '.join(ENCODERS)}")
    more = {"strength": strength} if kind == "FluxPipeline" else {}
    given, unconditional = ENCODERS[kind](pipeline, prompts, negative, tokens, **more)
    named = {
        **given,
        **{f"unconditional.{name}": None if half is None else half[:1] for name, half in unconditional.items()},
    }
    return {name: half.float().cpu().contiguous() for name, half in named.items() if half is not None}


def embeds_guidance(folder: Path) -> bool:
    """Whether the transformer of a pipeline folder is told the strength of its guidance."""
    config = folder / "transformer" / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("guidance_embeds"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("prompts", nargs=-1)
@click.option("--prompts", "file", type=click.Path(path_type=Path, exists=True), help="A text file, a prompt a line.")
@click.option("--negative", default="", help="What guidance goes away from.")
@click.option("--text-tokens", type=int, help="As given to calibrate; without it what the pipeline uses.")
@click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    default=3.5,
    show_default=True,
    help="FLUX: the strength of its distilled guidance; a model into which none was distilled is told none.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file at -o that this did not write.")
def main(
    folder: Path,
    prompts: tuple[str, ...],
    file: Path | None,
    negative: str,
    text_tokens: int | None,
    guidance_scale: float,
    device: str,
    output: Path,
    force: bool,
) -> None:
    """Write the embeddings of PROMPTS, by the text encoders of the pipeline in FOLDER."""
    lines = [] if file is None else [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = [*prompts, *(line for line in lines if line)]
    if not wanted:
        raise click.UsageError("no prompt given; name some, or a file of them with --prompts")
    if not math.isfinite(guidance_scale):
        raise click.UsageError(f"--guidance-scale must be a finite number, found {guidance_scale}")
    check_output(output, ARRAYS_FILE, reads=[folder, *([] if file is None else [file])], force=force)
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=None, vae=None, local_files_only=True)
    strength = guidance_scale if embeds_guidance(folder) else None
    arrays = encoded(pipeline.to(device), wanted, negative, text_tokens, strength)
    made_by = {"made_by": f"tc-deploy {__version__}"}
    write_output(output, safetensors.torch.save(arrays, metadata=made_by))
    for name, array in arrays.items():
        click.echo(f"{output}: {name} {tuple(array.shape)}")


if __name__ == "__main__":
    main()
