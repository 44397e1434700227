"""What the Cache Predictor's choice of tokens is worth, and when keeping tokens pays: tables of docs/quality.md.

One schedule, one budget per row, spent three ways: on the predictor's tokens, on random ones in the same blocks, and on
the predictor's with the budget spread evenly over the blocks. Beside it the best that no more cost buys without tokens:
skipping the whole model and forecasting its output, and fewer steps. Every figure is a sampling run in PyTorch from the
same noise; PSNR is to the model's own full run, cost is in full steps, by FLOPs.

    python examples/compare_tokens.py MODEL --guidance-scale 2 --work WORK

Predictors are kept in WORK, so that the rows may be made in several calls (``--attention``, ``--order``).
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from tc_deploy.calibrate.measure import with_steps
from tc_deploy.calibrate.recipe import PredictorRecipe
from tc_deploy.calibrate.training import record_trajectories, train_predictor
from tc_deploy.models.loading import load_model, load_scheduler
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.schedule import Schedule, tprr
from tc_deploy.search.baselines import evenly
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.tokencache.selection import phase_keep_counts, token_index_from_importance
from tc_deploy.types import Attention, FloatArray, Reuse, Skip

FIRST_SEED = 2_000_000
INTERVALS = (
    (2, 1, 0.5),
    (2, 1, 0.6),
    (2, 1, 0.7),
    (2, 1, 0.8),
    (2, 2, 0.5),
    (3, 2, 0.5),
    (3, 3, 0.5),
    (4, 2, 0.5),
    (4, 3, 0.5),
    (5, 4, 0.5),
    (6, 4, 0.5),
)
"""K_1, K_2 and the start of phase 2 as a share of the steps, of the runs without tokens."""
FEWER_STEPS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@click.command()
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--steps", default=50, show_default=True)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance.")
@click.option("--samples", default=16, show_default=True)
@click.option("--k", "intervals", type=(int, int), default=(3, 2), show_default=True)
@click.option("--keep", "keeps", type=float, multiple=True, default=(0.125, 0.25, 0.5), show_default=True)
@click.option("--order", "orders", type=int, multiple=True, default=(0, 2), show_default=True)
@click.option("--attention", "attentions", type=Attention, multiple=True, default=tuple(Attention), show_default=True)
@click.option("--iterations", default=200, show_default=True, help="Of the predictor's training.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where predictors are kept.")
def main(
    model_path: Path,
    steps: int,
    guidance_scale: float | None,
    samples: int,
    intervals: tuple[int, int],
    keeps: tuple[float, ...],
    orders: tuple[int, ...],
    attentions: tuple[Attention, ...],
    iterations: int,
    work: Path,
) -> None:
    """Print one line per attention, order and share of kept tokens for MODEL."""
    model, scheduler = load_model(model_path), load_scheduler(model_path)
    sampling = Sampling(scheduler=scheduler, steps=steps, guidance_scale=guidance_scale, set_timesteps_kwargs={})
    noise, conditions = draw_batch(model, sampling, range(FIRST_SEED, FIRST_SEED + samples))
    blocks, tokens = len(model.blocks), model.geometry.tokens
    schedule = tprr(
        steps=steps, phase_start=steps // 2, cache_interval_early=intervals[0], cache_interval_late=intervals[1]
    )
    nothing = CacheRecord(
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        forecast_order=0,
        keep_counts=((0,) * blocks, (0,) * blocks),
        skip=Skip.MODEL,
    )

    def full(sampling: Sampling) -> torch.Tensor:
        return denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))

    reference = full(sampling)

    def psnr_db(latents: torch.Tensor) -> float:
        return image_psnr_db(latents, reference, pixels=model.geometry.pixels)

    def cached(cache: CacheRecord, schedule: Schedule, importance: FloatArray) -> tuple[float, float]:
        index = token_index_from_importance(importance, cache.keep_counts, schedule)
        tables = StepTables.polynomial(schedule, cache.forecast_order, index)
        latents = denoise(model, sampling, noise, conditions, TokenCachedSteps(model, cache, schedule, tables))
        return count_flops(model, cache).in_full_steps(schedule), psnr_db(latents)

    random = np.random.default_rng(0).random((steps, blocks, tokens), dtype=np.float32)
    click.echo("| without tokens | cost in full steps | PSNR dB |\n|---|---|---|")
    others: dict[str, list[tuple[float, float]]] = {"skip": [], "fewer": []}
    for share in FEWER_STEPS:
        count = round(share * steps)
        others["fewer"].append((count, psnr_db(full(with_steps(model, sampling, count)))))
        click.echo(f"| fewer steps: {count} | {count} | {others['fewer'][-1][1]:.1f} |")
    for early, late, share in INTERVALS:
        other = tprr(
            steps=steps,
            phase_start=round(share * steps),
            cache_interval_early=early,
            cache_interval_late=late,
        )
        for order in (1, 2):
            found = cached(nothing.model_copy(update={"forecast_order": order}), other, random)
            others["skip"].append(found)
            what = f"K=({early}, {late}), phase start {other.phase_start}, order {order}, model skipped"
            click.echo(f"| {what} | {found[0]:.1f} | {found[1]:.1f} |")

    def best(kind: str, cost: float) -> str:
        return max((f"{db:.1f}" for at, db in others[kind] if at <= cost), key=float, default="-")

    click.echo(
        "\n| attention | order | kept | cost | predictor | random | uniform blocks | model skipped | fewer steps |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    trajectories = record_trajectories(model, sampling, range(PredictorRecipe().trajectories))
    ratio = sum(keeps) / len(keeps)
    for attention in attentions:
        for order in orders:
            cache = nothing.model_copy(update={"attention": attention, "forecast_order": order})
            state = work / f"{attention}-{order}-{iterations}-{ratio:g}.safetensors"
            training = PredictorRecipe(iterations=iterations)
            scores = train_predictor(model, cache, schedule, (ratio, ratio), trajectories, training, 0, state).numpy()
            for keep in keeps:
                counts = phase_keep_counts(scores, (keep, keep), 8, schedule)
                chosen = cache.model_copy(update={"keep_counts": counts})
                even = tuple(evenly(sum(phase), blocks, tokens) for phase in counts)
                uniform = cache.model_copy(update={"keep_counts": even})
                cost, predicted = cached(chosen, schedule, scores)
                figures = [predicted, cached(chosen, schedule, random)[1], cached(uniform, schedule, scores)[1]]
                cells = [*(f"{figure:.1f}" for figure in figures), best("skip", cost), best("fewer", cost)]
                click.echo(f"| {attention} | {order} | {keep:g} | {cost:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
