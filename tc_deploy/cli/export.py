"""``tc-deploy export``: a plan and its checkpoint to ONNX graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tc_deploy.backends.registry import BACKENDS
from tc_deploy.bundle import MANIFEST, canonical_json
from tc_deploy.cli.config import config_option
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MODEL_PATH, MOST, NEW_PATH, PATH, json_option
from tc_deploy.cli.progress import progress_bar
from tc_deploy.errors import UsageError, counted
from tc_deploy.golden import sampled_on_in_words
from tc_deploy.inspect import departure, inspect_path
from tc_deploy.plan import RANDOM
from tc_deploy.types import Precision

if TYPE_CHECKING:
    from tc_deploy.models.lora import Lora


@click.command(cls=GroupedCommand)
@click.argument("plan", type=PATH)
@option("-o", "--output", required=True, type=NEW_PATH, help="Bundle folder, engines/NAME.")
@option("--model", type=MODEL_PATH, help="The checkpoint, if it is not where the plan says.")
@option(
    "--static-batch",
    type=click.IntRange(1, MOST),
    metavar="N",
    help="Fix N samples per batch; without it the batch is dynamic.",
)
@option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="What matrix products, their weights and the caches are in; everything else is fp32.",
)
@option(
    "--fp32-block",
    "fp32_blocks",
    advanced=True,
    multiple=True,
    metavar="NAME",
    help="A block that stays in fp32, as transformer_blocks.3; repeatable.",
)
@option(
    "--one-graph",
    advanced=True,
    is_flag=True,
    help="One graph for all steps that run the model, so that an engine holds the weights once. For plans that keep"
    " tokens in most blocks; it takes longer where few tokens are kept.",
)
@option(
    "--prologue/--no-prologue",
    advanced=True,
    default=False,
    show_default=True,
    help="Compute what follows from the request and the timesteps alone, as adaLN's modulation, once before the first"
    " step: its weights leave the steps' graphs.",
)
@option(
    "--with-decoder", is_flag=True, help="Also export the decoder of the pipeline's autoencoder: pictures, not latents."
)
@option("--with-text-encoder", is_flag=True, help="Also export the pipeline's text encoders: prompts, not embeddings.")
@option(
    "--pipeline",
    advanced=True,
    metavar="FOLDER",
    type=PATH,
    help="The diffusers pipeline that holds vae/, text_encoder/ and tokenizer/, if it is not where the model is.",
)
@option(
    "--variant",
    advanced=True,
    metavar="NAME",
    help="Which copy of the weights, as fp16 of model.fp16.safetensors; without it the plan's.",
)
@option(
    "--lora",
    "loras",
    advanced=True,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to make part of the exported weights, as the pipeline's load_lora_weights reads it. Repeat it for"
    " several.",
)
@option(
    "--conditions",
    advanced=True,
    metavar=f"FILE|{RANDOM}",
    help="What graphs are compared on, and engines validated by, in place of the plan's prompts: a file of"
    f" embeddings, or {RANDOM} draws.",
)
@option("--check/--no-check", advanced=True, default=True, show_default=True, help="Compare every graph with PyTorch.")
@config_option
@json_option
def command(
    plan: Path,
    output: Path,
    model: Path | None,
    static_batch: int | None,
    precision: str,
    fp32_blocks: tuple[str, ...],
    one_graph: bool,
    prologue: bool,
    with_decoder: bool,
    with_text_encoder: bool,
    pipeline: Path | None,
    variant: str | None,
    loras: tuple[str, ...],
    conditions: str | None,
    check: bool,
    as_json: bool,
) -> None:
    """Export the full and the cached graphs, the solver and one shared weights file.

    PLAN is a folder calibration/NAME. An existing bundle is replaced, with the engines built from it.
    """
    from tc_deploy.export.bundle_export import export_bundle
    from tc_deploy.export.options import ExportOptions

    lost = [kind for kind in BACKENDS if (output / kind / MANIFEST).is_file()]
    with progress_bar() as report:
        manifest = export_bundle(
            plan,
            output,
            ExportOptions(
                model_path=model,
                batch_size=static_batch,
                precision=Precision(precision),
                fp32_blocks=fp32_blocks,
                check=check,
                one_graph=one_graph,
                prologue=prologue,
                with_decoder=with_decoder,
                with_text_encoder=with_text_encoder,
                pipeline_path=pipeline,
                variant=variant,
                loras=tuple(map(_lora, loras)),
                conditions=conditions,
            ),
            progress=lambda what: report(what, 0, 1),
        )
    if as_json:
        click.echo(canonical_json({**inspect_path(output), "engines_lost": lost}), nl=False)
        return
    for name, graph in manifest.graphs.items():
        inputs, outputs = counted(len(graph.inputs), "input"), counted(len(graph.outputs), "output")
        error = departure(name, graph.max_abs_error, manifest.solver.init_noise_sigma)
        if graph.snr_to_fp32_db is not None:
            error += f", {graph.snr_to_fp32_db:.1f} dB above its error to fp32"
        click.echo(f"{output / graph.file}: {name}, {inputs}, {outputs}, {error}")
    batch = "any size" if manifest.batch_size is None else str(manifest.batch_size)
    on = sampled_on_in_words(manifest.sampled_on, manifest.batch_size or 1)
    click.echo(f"{output}: computes in {manifest.precision}, batches of {batch}, sampled on {on}")
    for tokenizer in manifest.text.tokenizers if manifest.text else ():
        click.echo(f"{output / tokenizer.file}: prompts are padded or cut to {counted(tokenizer.tokens, 'token')}")
    if lost:
        click.echo(f"{output}: the engines of the earlier export are gone ({', '.join(lost)}); build them again")


def _lora(text: str) -> Lora:
    """A file and its scale, as they are written on the command line.

    Raises:
        UsageError: the scale is no finite number.
    """
    from tc_deploy.models.lora import Lora

    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or scale.endswith(".safetensors"):
        return Lora(path=Path(text))
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--lora {text}: expected FILE or FILE:SCALE with a finite number, found {scale!r}")
    return Lora(path=Path(name), scale=value)
