"""``tc-deploy generate``: built engines to pictures."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tc_deploy.bundle import check_writable, write_bytes
from tc_deploy.cli.progress import progress_bar
from tc_deploy.conditions import checked_conditions, read_conditions
from tc_deploy.errors import UsageError, counted
from tc_deploy.sheet import sheet_of

LARGEST_DEFAULT_BATCH = 16
PNG = ".png"
LATENTS = (".safetensors", ".npy")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--class-label", "labels", type=int, multiple=True, help="Repeat it for several.")
@click.option(
    "--conditions",
    "prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Instead of labels: a safetensors file of prompt embeddings, as examples/encode_prompts.py writes it.",
)
@click.option("-n", "--count", type=int, help="Pictures to make, labels or prompts in turn; one of each if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help="Picture i has seed SEED + i.")
@click.option("--guidance-scale", type=float, help="Instead of the plan's.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A .png sheet, or latents as .safetensors or .npy.",
)
@click.option("--full", is_flag=True, help="Run every step in full, for comparison.")
@click.option("--backend", help="Which of the bundle's engines.")
@click.option(
    "--batch-size", type=int, help=f"Pictures that run together; at most {LARGEST_DEFAULT_BATCH} if not given."
)
@click.option("--zoom", type=click.IntRange(1, 64), default=1, show_default=True, help="Enlarge the sheet's pixels.")
def command(
    bundle: Path,
    labels: tuple[int, ...],
    prompts: Path | None,
    count: int | None,
    seed: int,
    guidance_scale: float | None,
    output: Path,
    full: bool,
    backend: str | None,
    batch_size: int | None,
    zoom: int,
) -> None:
    """Make pictures with the engines of BUNDLE (engines/NAME)."""
    from tc_deploy.runtime.pipeline import load

    if output.suffix not in (PNG, *LATENTS):
        raise UsageError(f"{output}: the output must end in .png (a sheet), .safetensors or .npy (latents)")
    if bool(labels) == (prompts is not None):
        raise UsageError("give either --class-label or --conditions FILE, and not both")
    wanted, unconditional = ({}, {}) if prompts is None else read_conditions(prompts)
    given = len(labels) or max((len(array) for array in wanted.values() if array.ndim), default=0)
    count = given if count is None else count
    if count < 1:
        raise UsageError(f"-n must be at least 1, found {count}" if given else f"{prompts}: no prompt in it")
    if count < given:
        raise UsageError(
            f"-n {count} is less than the {given} labels or prompts given; give -n at least that, or fewer of them"
        )
    turns = np.arange(count) % given
    if batch_size is None:
        batch_size = _default_batch(bundle, count)
    with load(bundle, backend, batch_size=batch_size) as pipeline:
        if output.suffix == PNG and not pipeline.manifest.pixels:
            raise UsageError(
                f"{bundle} makes latents and has no decoder; write them with -o {output.with_suffix('.safetensors')}"
            )
        request: dict[str, Any]
        if prompts is None:
            request = {"class_labels": [labels[turn] for turn in turns]}
        else:
            needed, guided = pipeline.manifest.conditions, pipeline.manifest.guided
            checked = checked_conditions(needed, wanted, unconditional, guided=guided, where=str(prompts)).rows(turns)
            request = {"conditions": checked.given, "unconditional": checked.unconditional if guided else None}
        check_writable(output)
        pipeline.warmup()
        with progress_bar() as report:
            start_s = time.perf_counter()
            result = pipeline(
                **request,
                seed=seed,
                guidance_scale=guidance_scale,
                full=full,
                on_step=lambda first, step: report(
                    "denoising",
                    first // pipeline.batch_size * step.total + step.index + 1,
                    math.ceil(count / pipeline.batch_size) * step.total,
                ),
            )
            elapsed_s = time.perf_counter() - start_s
    images = result.images if output.suffix == PNG else None
    write_bytes(output, _latents(result.latents, output.suffix) if images is None else _png(images, zoom))
    click.echo(
        f"{output}: {counted(count, 'picture')}, {result.steps_full} full + {result.steps_cached} cached steps,"
        f" {elapsed_s:.2f} s with {pipeline.backend}"
    )


def _default_batch(bundle: Path, count: int) -> int | None:
    from tc_deploy.manifest import read_manifest

    return min(count, LARGEST_DEFAULT_BATCH) if read_manifest(bundle).batch_size is None else None


def _latents(array: NDArray[Any], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.numpy.save({"latents": array})
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _png(images: NDArray[np.uint8], zoom: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    sheet = Image.fromarray(sheet_of(images))
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(stream, format="PNG")
    return stream.getvalue()
