"""What each caching choice costs and keeps, on one model: the table of docs/quality.md.

Every row is a sampling run in PyTorch from the same noise; PSNR is to the model's own full run, cost is in full steps,
by FLOPs. Rows with "fewer steps" are the unmodified model with fewer steps: what a choice must beat at its cost. Kept
tokens are spread evenly and change from step to step (no predictor), so that rows differ in one thing only.

    python examples/compare_choices.py examples/digits-dit --guidance-scale 2 --samples 32
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import numpy as np
import torch

from tc_deploy.models.loading import load_model, load_scheduler
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.schedule import tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.tokencache.selection import spread_importance, token_index_from_importance
from tc_deploy.types import Attention, Reuse, Skip

FEWER_STEPS = (0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
FIRST_SEED = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One row; keep is the share of every block's tokens in a cached step of phases 1 and 2."""

    cache_interval_early: int = 4
    cache_interval_late: int = 2
    phase_start: float = 0.5
    keep: tuple[float, float] = (0.0, 0.0)
    order: int = 1
    attention: Attention = Attention.ALL
    reuse: Reuse = Reuse.BRANCH
    skip: Skip = Skip.BLOCKS


CHOICES = (
    Choice(),
    Choice(order=0),
    Choice(order=2),
    Choice(reuse=Reuse.RESIDUAL),
    Choice(cache_interval_early=2, cache_interval_late=4),
    Choice(cache_interval_early=3, cache_interval_late=3),
    Choice(cache_interval_early=3, cache_interval_late=2),
    Choice(cache_interval_early=5, cache_interval_late=2),
    Choice(phase_start=0.4),
    Choice(phase_start=0.6),
    Choice(phase_start=0.7),
    Choice(cache_interval_early=6, cache_interval_late=3),
    Choice(cache_interval_early=6, cache_interval_late=3, phase_start=0.7),
    Choice(skip=Skip.MODEL, order=0),
    Choice(skip=Skip.MODEL),
    Choice(skip=Skip.MODEL, order=2),
    Choice(skip=Skip.MODEL, cache_interval_early=3, cache_interval_late=2),
    Choice(skip=Skip.MODEL, cache_interval_early=3, cache_interval_late=2, order=2),
    Choice(skip=Skip.MODEL, cache_interval_early=6, cache_interval_late=4),
    Choice(skip=Skip.MODEL, cache_interval_early=6, cache_interval_late=4, order=2),
    Choice(keep=(0.0, 0.125)),
    Choice(keep=(0.0, 0.25)),
    Choice(keep=(0.25, 0.25)),
    Choice(keep=(0.25, 0.25), attention=Attention.KEPT),
    Choice(keep=(0.25, 0.25), order=0),
    Choice(keep=(0.25, 0.25), order=0, attention=Attention.KEPT, reuse=Reuse.RESIDUAL),
    Choice(keep=(0.5, 0.5)),
    Choice(cache_interval_early=6, cache_interval_late=3, keep=(0.25, 0.25)),
)


@click.command()
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--steps", default=50, show_default=True)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance.")
@click.option("--samples", default=32, show_default=True)
def main(model_path: Path, steps: int, guidance_scale: float | None, samples: int) -> None:
    """Print one line per choice for MODEL."""
    model = load_model(model_path)
    sampling = Sampling(
        scheduler=load_scheduler(model_path), steps=steps, guidance_scale=guidance_scale, set_timesteps_kwargs={}
    )
    noise, conditions = draw_batch(model, sampling, range(FIRST_SEED, FIRST_SEED + samples))
    blocks, tokens = len(model.blocks), model.geometry.tokens

    def full(count: int) -> torch.Tensor:
        fewer = dataclasses.replace(sampling, steps=count)
        return denoise(model, fewer, noise, conditions, lambda _, inputs: model.forward(inputs))

    reference = full(steps)
    click.echo("| choice | cost in full steps | PSNR dB |\n|---|---|---|")

    def row(name: str, cost: float, latents: torch.Tensor) -> None:
        psnr = image_psnr_db(latents, reference, pixels=model.geometry.pixels)
        click.echo(f"| {name} | {cost:.1f} | {psnr:.1f} |")

    for share in FEWER_STEPS:
        count = round(share * steps)
        row(f"fewer steps: {count}", count, full(count))
    for choice in CHOICES:
        schedule = tprr(
            steps=steps,
            phase_start=round(choice.phase_start * steps),
            cache_interval_early=choice.cache_interval_early,
            cache_interval_late=choice.cache_interval_late,
        )
        counts = [(round(ratio * tokens),) * blocks for ratio in choice.keep]
        cache = CacheRecord(
            reuse=choice.reuse,
            attention=choice.attention,
            forecast_order=choice.order,
            keep_counts=(counts[0], counts[1]),
            skip=choice.skip,
        )
        spread = np.stack([spread_importance(blocks, tokens, step) for step in range(steps)])
        index = token_index_from_importance(spread, cache.keep_counts, schedule)
        cost = count_flops(model, cache).in_full_steps(schedule)
        tables = StepTables.polynomial(schedule, cache.forecast_order, index)
        latents = denoise(model, sampling, noise, conditions, TokenCachedSteps(model, cache, schedule, tables))
        rule = f"K=({choice.cache_interval_early}, {choice.cache_interval_late}), phase start {schedule.phase_start}"
        name = (
            f"{rule}, keep {choice.keep[0]:g}/{choice.keep[1]:g},"
            f" order {choice.order}, attention {choice.attention}, reuse {choice.reuse}"
        )
        if choice.skip is Skip.MODEL:
            name = f"{rule}, order {choice.order}, model skipped"
        row(name, cost, latents)


if __name__ == "__main__":
    main()
