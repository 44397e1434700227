"""The demo's last step: digits by cached engines, and what caching cost in quality and saved in time.

Reads the built bundle, makes the same digits with the plan's schedule and with every step full (interleaved, so that a
noisy machine hits both alike), and runs the model with fewer full steps in PyTorch from the same noise: as many as the
plan's time or FLOPs would pay for, whichever is more. Writes ``NAME-demo.png`` and ``NAME-demo.json`` beside the bundle
``NAME``, whose folder holds what tc-deploy wrote and nothing else.

    python examples/digits_demo.py --bundle engines/digits
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch
from digits import CLASSES, class_accuracy
from PIL import Image, ImageDraw, PngImagePlugin
from rich.progress import Progress

import tc_deploy
from tc_deploy.bundle import check_output, write_output
from tc_deploy.bundle.marks import JSON_FILE, SHEET_FILE, SOFTWARE
from tc_deploy.hardware import hardware_line
from tc_deploy.models.loading import load_model
from tc_deploy.plan import places_read
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.sheet import sheet_of
from tc_deploy.tokencache.sampler import denoise

BATCH = 20
COLUMNS = 10
ZOOM = 4
MARGIN, TITLE = 24, 40
"""Pixels between the halves of the sheet, and above them."""


def fewer_full_steps(pipeline: tc_deploy.Pipeline, steps: int, labels: list[int], noise: torch.Tensor) -> torch.Tensor:
    """Sample with the unmodified model and fewer steps, in PyTorch: (B, C, H, W)."""
    plan = pipeline.plan
    model = load_model(Path(plan.model.source))
    sampling = dataclasses.replace(sampling_from_plan(plan), steps=steps)
    conditions = {"class_labels": torch.tensor(labels, dtype=torch.int32)}
    return denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))


def sheet_png(halves: dict[str, np.ndarray]) -> bytes:
    """Two sets of (n, H, W) pictures side by side, in rows of ten, each below its title."""
    sheets = [Image.fromarray(sheet_of(images, COLUMNS)) for images in halves.values()]
    sheets = [sheet.resize((sheet.width * ZOOM, sheet.height * ZOOM), Image.Resampling.NEAREST) for sheet in sheets]
    width, height = sheets[0].size
    page = Image.new("L", (2 * width + MARGIN, TITLE + height), 255)
    for left, (title, sheet) in zip((0, width + MARGIN), zip(halves, sheets, strict=True), strict=True):
        ImageDraw.Draw(page).text((left + TITLE // 4, TITLE // 4), title, fill=0, font_size=TITLE // 2)
        page.paste(sheet, (left, TITLE))
    stream, mark = io.BytesIO(), PngImagePlugin.PngInfo()
    mark.add_text(*SOFTWARE)
    page.save(stream, format="PNG", pnginfo=mark)
    return stream.getvalue()


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("engines/digits"), show_default=True)
@click.option("--count", type=click.IntRange(min=BATCH), default=100, show_default=True, help="Digits to make.")
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace files of those names that tc-deploy did not write.")
def main(bundle: Path, count: int, seed: int, force: bool) -> None:
    """Make digits with cached and with full engines and compare."""
    sheet, numbers = (bundle.with_name(f"{bundle.name}-demo{suffix}") for suffix in (".png", ".json"))
    for path, kind in ((sheet, SHEET_FILE), (numbers, JSON_FILE)):
        check_output(path, kind, reads=places_read(bundle), force=force)
    count -= count % BATCH
    labels = [index % CLASSES for index in range(count)]
    times_s: dict[bool, list[float]] = {False: [], True: []}
    made: dict[bool, list[np.ndarray]] = {False: [], True: []}
    images: dict[bool, list[np.ndarray]] = {False: [], True: []}
    with tc_deploy.load(bundle, batch_size=BATCH) as pipeline, Progress() as progress:
        pipeline.warmup()
        task = progress.add_task("making digits, cached and full in turn", total=count)
        for start in range(0, count, BATCH):
            for full in (False, True):
                start_s = time.perf_counter()
                result = pipeline(class_labels=labels[start : start + BATCH], seed=seed + start, full=full)
                times_s[full].append(time.perf_counter() - start_s)
                made[full].append(result.latents)
                images[full].append(result.images)
                if not full:
                    steps_full, steps_cached = result.steps_full, result.steps_cached
            progress.advance(task, BATCH)
        cached_s, full_s = (statistics.median(times_s[full]) for full in (False, True))
        plan = pipeline.plan
        share = min(1.0, max(plan.cost_ratio(), cached_s / full_s))
        affordable = math.ceil(plan.schedule.steps * share)
        noise = torch.from_numpy(pipeline.noise(seed, count))
        fewer = fewer_full_steps(pipeline, affordable, labels, noise)

    cached, full = (torch.from_numpy(np.concatenate(made[kind])) for kind in (False, True))
    facts = {
        "made_by": f"tc-deploy {tc_deploy.__version__}",
        "steps_full": steps_full,
        "steps_cached": steps_cached,
        "full_s": round(full_s, 4),
        "cached_s": round(cached_s, 4),
        "time_ratio": round(cached_s / full_s, 4),
        "cost_ratio": round(plan.cost_ratio(), 4),
        "psnr_db": round(image_psnr_db(cached, full, pixels=True), 2),
        "fewer_steps": affordable,
        "fewer_steps_psnr_db": round(image_psnr_db(fewer, full, pixels=True), 2),
        "class_accuracy": class_accuracy(cached.numpy(), np.array(labels)),
        "pictures": count,
        "batch_size": BATCH,
        "hardware": hardware_line(),
    }
    titles = {
        f"{steps_full} full + {steps_cached} cached steps": False,
        f"{steps_full + steps_cached} full steps": True,
    }
    write_output(sheet, sheet_png({title: np.concatenate(images[kind]) for title, kind in titles.items()}))
    write_output(numbers, (json.dumps(facts, indent=2) + "\n").encode())
    click.echo(
        f"{sheet}: {steps_full} full + {steps_cached} cached steps;"
        f" {full_s:.2f} s full against {cached_s:.2f} s cached for {BATCH} pictures on {facts['hardware']};"
        f" PSNR cached to full {facts['psnr_db']:.1f} dB, {affordable} full steps in that time or FLOPs"
        f" {facts['fewer_steps_psnr_db']:.1f} dB; {100 * facts['class_accuracy']:.0f} % read as the class asked for"
    )


if __name__ == "__main__":
    main()
