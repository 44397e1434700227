"""``tc-deploy generate``: built engines to pictures."""

from __future__ import annotations

import io
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tc_deploy import __version__
from tc_deploy.bounds import MAX_GUIDANCE
from tc_deploy.bundle import canonical_json, check_output, reading, write_output
from tc_deploy.bundle.marks import ARRAYS_FILE, NUMPY_FILE, SHEET_FILE, SOFTWARE
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MOST, NEW_PATH, PATH, Number, force_option, frozen_option, json_option
from tc_deploy.cli.progress import progress_bar
from tc_deploy.conditions import GUIDANCE, checked_conditions, read_conditions
from tc_deploy.errors import UsageError, counted
from tc_deploy.hardware import check_fits_memory
from tc_deploy.manifest import BUNDLE_FOLDER, DECODER, Manifest, read_manifest
from tc_deploy.plan import load_plan, places_read
from tc_deploy.runtime.request import MAX_SEED
from tc_deploy.sheet import sheet_of

LOG = logging.getLogger(__name__)
LARGEST_DEFAULT_BATCH = 16
PNG = ".png"
REQUIRE_SIGNATURE = "TC_DEPLOY_REQUIRE_SIGNATURE"
LATENTS = (".safetensors", ".npy")
OUTPUTS = {PNG: SHEET_FILE, ".safetensors": ARRAYS_FILE, ".npy": NUMPY_FILE}
MOST_IMAGES = 1_000_000
"""Of one call, each with a seed of its own; memory has its say before."""


def _key(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001
    """The key; click takes an empty variable for none, and whoever set it wanted to be safe."""
    if value is None and os.environ.get(REQUIRE_SIGNATURE) == "":
        raise click.BadParameter(f"{REQUIRE_SIGNATURE} is empty; name a public key's file, or unset it")
    return value


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option("--class-label", "labels", type=click.IntRange(-MOST, MOST), multiple=True, help="Repeat it for several.")
@option("--prompt", "prompts", multiple=True, help="For a bundle with a text encoder. Repeat it for several.")
@option("--negative-prompt", help="What guidance goes away from, for all prompts alike.")
@option(
    "--conditions",
    "file",
    advanced=True,
    metavar="FILE",
    type=PATH,
    help="Instead: a safetensors file of prompt embeddings, by the transformer's names for them.",
)
@option(
    "-n",
    "--count",
    type=click.IntRange(1, MOST_IMAGES),
    help="Pictures to make, labels or prompts in turn; one of each if not given.",
)
@option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Picture i has seed SEED + i.")
@option(
    "--guidance-scale",
    type=Number(0, MAX_GUIDANCE),
    help="Instead of the plan's; 1 and less are none. For FLUX the strength of the distilled guidance.",
)
@option(
    "--true-cfg-scale",
    advanced=True,
    type=Number(0, MAX_GUIDANCE),
    help="For FLUX: classifier-free guidance, instead of the plan's.",
)
@option(
    "-o",
    "--output",
    required=True,
    type=NEW_PATH,
    help="A .png, of several pictures one each, as NAME-SEED.png; or latents as .safetensors or .npy; with --input a"
    " folder.",
)
@option(
    "--input",
    "rows",
    metavar="FILE",
    type=PATH,
    help='Instead: a request a line, as the server takes it: {"prompt": ..., "seed": ...}. Lines that are done are'
    " skipped when it runs again.",
)
@option("--ray", advanced=True, is_flag=True, help="With --input: spread the lines over the machines of a Ray cluster.")
@option(
    "--workers",
    advanced=True,
    type=click.IntRange(1, MOST),
    help="With --ray: engines; one for each of the cluster's GPUs, or one, if not given.",
)
@option("--sheet", is_flag=True, help="All pictures on one .png.")
@option(
    "--require-signature",
    advanced=True,
    metavar="KEY",
    type=PATH,
    envvar=REQUIRE_SIGNATURE,
    callback=_key,
    show_envvar=True,
    help="Refuse a bundle that the holder of this public key has not signed.",
)
@force_option
@option("--full", is_flag=True, help="Run every step in full, for comparison.")
@option("--backend", help="Which of the bundle's engines.")
@option(
    "--batch-size",
    type=click.IntRange(1, MOST),
    help=f"Pictures that run together; at most {LARGEST_DEFAULT_BATCH} if not given.",
)
@json_option
@frozen_option("--steps", "--num-inference-steps")
@frozen_option("--height")
@frozen_option("--width")
@option(
    "--zoom",
    advanced=True,
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Enlarge the pictures' pixels.",
)
def command(
    bundle: Path,
    labels: tuple[int, ...],
    prompts: tuple[str, ...],
    negative_prompt: str | None,
    file: Path | None,
    count: int | None,
    seed: int,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
    output: Path,
    rows: Path | None,
    ray: bool,
    workers: int | None,
    sheet: bool,
    require_signature: Path | None,
    force: bool,
    full: bool,
    backend: str | None,
    batch_size: int | None,
    zoom: int,
    as_json: bool,
    steps: int | None,
    height: int | None,
    width: int | None,
) -> None:
    """Make pictures with the engines of BUNDLE (engines/NAME)."""
    if (ray or workers is not None) and (rows is None or not ray):
        raise UsageError("--workers goes with --ray, and --ray with --input")
    if rows is not None:
        ours: dict[str, Any] = {"--class-label": labels, "--prompt": prompts, "--negative-prompt": negative_prompt}
        ours |= {"--conditions": file, "-n": count, "--guidance-scale": guidance_scale, "--sheet": sheet}
        ours |= {"--true-cfg-scale": true_cfg_scale, "--full": full, "--force": force, "--steps": steps}
        ours |= {"--height": height, "--width": width, "--zoom": zoom > 1}
        if too := [name for name, value in ours.items() if value is not None and value is not False and value != ()]:
            raise UsageError(f"{too[0]} does not go with --input, whose lines say what to make")
        from tc_deploy.cli.generate_rows import generate_rows

        generate_rows(
            rows,
            output,
            bundle,
            backend=backend,
            batch_size=batch_size,
            require_signature=require_signature,
            seed=seed,
            ray=ray,
            count=workers,
            as_json=as_json,
        )
        return
    from tc_deploy.runtime.guidance import remarks_on_guidance
    from tc_deploy.runtime.pipeline import load
    from tc_deploy.runtime.request import GUIDANCE_SCALE, TRUE_CFG_SCALE

    if output.suffix not in (PNG, *LATENTS):
        raise UsageError(f"{output}: the output must end in .png (pictures), .safetensors or .npy (latents)")
    if sheet and output.suffix != PNG:
        raise UsageError(f"{output}: a sheet is a .png; latents need none: leave --sheet out")
    with reading(bundle, BUNDLE_FOLDER):  # which puts right what a process left that died while it replaced the bundle
        _check_frozen(bundle, steps=steps, height=height, width=width)
        manifest = read_manifest(bundle)
    if bool(labels) + bool(prompts) + (file is not None) != bool(manifest.conditions):
        raise UsageError(f"{bundle} takes {_takes(manifest)}")
    if negative_prompt is not None and not prompts:
        raise UsageError("--negative-prompt goes with --prompt; a file of conditions holds its own")
    reads = [*places_read(bundle), *(path for path in (file, require_signature) if path is not None)]
    wanted, unconditional = ({}, {}) if file is None else read_conditions(file)
    given = len(labels) or len(prompts) or max((len(array) for array in wanted.values() if array.ndim), default=0)
    if not manifest.conditions:
        given = 1
    count = given if count is None else count
    if count < 1:
        raise UsageError(f"-n must be at least 1, found {count}" if given else f"{file}: no prompt in it")
    if count < given:
        raise UsageError(
            f"-n {count} is less than the {given} labels or prompts given; give -n at least that, or fewer of them"
        )
    files = _files(output, count, seed, sheet=sheet)
    for file_made in files:
        check_output(file_made, OUTPUTS[output.suffix], reads=reads, force=force)
    turns = np.arange(count) % given
    if batch_size is None:
        batch_size = _default_batch(bundle, count)
    with load(bundle, backend, batch_size=batch_size, require_signature=require_signature) as pipeline:
        if output.suffix == PNG and not pipeline.manifest.pixels and pipeline.manifest.decoder is None:
            raise UsageError(
                f"{bundle} makes latents and has no decoder; write them with -o {output.with_suffix('.safetensors')},"
                " or export it with one: tc-deploy export PLAN -o BUNDLE --with-decoder"
            )
        request: dict[str, Any]
        if labels:
            request = {"class_labels": [labels[turn] for turn in turns]}
        elif prompts:
            request = {"prompt": [prompts[turn] for turn in turns], "negative_prompt": negative_prompt}
        elif file is None:
            request = {"count": count}
        else:
            needed, guided = pipeline.manifest.conditions, pipeline.manifest.guided
            if pipeline.manifest.solver.embedded_guidance is not None:
                # The request tells the model how strong its guidance is where a file does not.
                needed = tuple(item for item in needed if item.name in wanted or item.name != GUIDANCE)
            checked = checked_conditions(needed, wanted, unconditional, guided=guided, where=str(file)).rows(turns)
            request = {"conditions": checked.given, "unconditional": checked.unconditional if guided else None}
        _check_size(pipeline.manifest, count, zoom if output.suffix == PNG else None)
        asked = {GUIDANCE_SCALE: guidance_scale, TRUE_CFG_SCALE: true_cfg_scale}
        for remark in remarks_on_guidance(pipeline.manifest, pipeline.plan, asked):
            LOG.warning("%s", remark)
        pipeline.warmup()
        with progress_bar() as report:
            start_s = time.perf_counter()
            result = pipeline(
                **request,
                seed=seed,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                full=full,
                decode=output.suffix == PNG,
                on_step=lambda first, step: report(
                    "denoising",
                    first // pipeline.batch_size * step.total + step.index + 1,
                    math.ceil(count / pipeline.batch_size) * step.total,
                ),
            )
            elapsed_s = time.perf_counter() - start_s
    if result.images is None or output.suffix != PNG:
        write_output(output, _latents(result.latents, output.suffix))
    else:
        groups = [result.images] if sheet else [result.images[one : one + 1] for one in range(count)]
        for path, images in zip(files, groups, strict=True):
            write_output(path, _png(images, zoom))
    if as_json:
        facts = {
            "files": [str(path) for path in files],
            "pictures": count,
            "seeds": [seed + index for index in range(count)],
            "steps_full": result.steps_full,
            "steps_cached": result.steps_cached,
            "elapsed_s": elapsed_s,
            "backend": pipeline.backend,
        }
        click.echo(canonical_json(facts), nl=False)
        return
    others = f" to {files[-1].name}" if len(files) > 1 else ""
    click.echo(
        f"{files[0]}{others}: {counted(count, 'picture')}, {result.steps_full} full + {result.steps_cached} cached"
        f" steps, {elapsed_s:.2f} s with {pipeline.backend}"
    )


def _files(output: Path, count: int, seed: int, *, sheet: bool) -> list[Path]:
    """What is written: one file, or of several pictures one each, named after its seed."""
    if sheet or count == 1 or output.suffix != PNG:
        return [output]
    digits = len(str(seed + count - 1))
    return [output.with_stem(f"{output.stem}-{seed + index:0{digits}}") for index in range(count)]


def _check_frozen(bundle: Path, *, steps: int | None, height: int | None, width: int | None) -> None:
    """Say of what a plan fixes that it does, and which command makes another.

    Raises:
        UsageError: another value is asked for.
    """
    if (steps, height, width) == (None, None, None):
        return
    manifest, (plan, _) = read_manifest(bundle), load_plan(bundle)
    again = f"tc-deploy calibrate {plan.model.source} -o PLAN"
    if steps is not None and steps != plan.schedule.steps:
        raise UsageError(
            f"{bundle} runs {plan.schedule.steps} steps: which of them are full is the plan's, and built in; for"
            f" {steps} make another: {again} --steps {steps}, then export and build it"
        )
    if height is None and width is None:
        return
    if manifest.decoder is None and not manifest.pixels:
        raise UsageError(
            f"{bundle} makes latents of {'x'.join(map(str, manifest.latent_shape))} and no pictures: their size is the"
            f" plan's, and built in; leave --height and --width out, or make another plan: {again} --height H"
            " --width W, then export and build it"
        )
    latents = images = manifest.latent_shape[-2:]
    if manifest.decoder is not None:
        images = tuple(size for size in manifest.graphs[DECODER].outputs[0].shape if isinstance(size, int))[-2:]
    asked = (height or images[0], width or images[1])
    if asked != tuple(images):
        raise UsageError(
            f"{bundle} makes pictures of {images[0]}x{images[1]} from latents of {'x'.join(map(str, latents))}: the"
            f" size is the plan's, and built in; for {asked[0]}x{asked[1]} make another: {again} --height {asked[0]}"
            f" --width {asked[1]}, then export and build it"
        )


def _takes(manifest: Manifest) -> str:
    """By which options a bundle is told what to make."""
    if not manifest.conditions:
        return "no condition; give -n alone, how many pictures to make"
    labels = ["--class-label"] if manifest.takes_labels else []
    prompts = [] if manifest.text is None else ["--prompt"]
    return f"{' or '.join([*labels, *prompts, '--conditions FILE'])}; give one of them"


def _check_size(manifest: Manifest, count: int, zoom: int | None) -> None:
    """Check that all that is held until it is written fits the machine; ``zoom`` is None where latents are written."""
    size_bytes = 4 * count * math.prod(manifest.latent_shape)
    if zoom is not None:
        shape = manifest.latent_shape
        if manifest.decoder is not None:
            shape = tuple(size for size in manifest.graphs[DECODER].outputs[0].shape if isinstance(size, int))
        size_bytes += count * math.prod(shape) * zoom**2
    check_fits_memory(size_bytes, counted(count, "picture") + ("" if zoom in (None, 1) else f" enlarged {zoom} times"))


def _default_batch(bundle: Path, count: int) -> int | None:
    return min(count, LARGEST_DEFAULT_BATCH) if read_manifest(bundle).batch_size is None else None


def _latents(array: NDArray[Any], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.numpy.save({"latents": array}, metadata={"made_by": f"tc-deploy {__version__}"})
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _png(images: NDArray[np.uint8], zoom: int) -> bytes:
    from PIL import Image, PngImagePlugin

    stream = io.BytesIO()
    # Of video each row of the sheet holds one's frames.
    frames = images.shape[1] if images.ndim == 5 else None
    sheet = Image.fromarray(sheet_of(images.reshape(-1, *images.shape[-3:]) if frames else images, frames))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*SOFTWARE)
    sheet.save(stream, format="PNG", pnginfo=mark)
    return stream.getvalue()
