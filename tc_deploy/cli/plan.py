"""``tc-deploy plan``: search for the plan that fits a budget, with the baselines beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import (
    MODEL_PATH,
    MOST,
    NEW_PATH,
    Number,
    device_option,
    json_option,
    recipe_options,
    recipe_overrides,
)
from tc_deploy.cli.progress import progress_bar

if TYPE_CHECKING:
    from tc_deploy.search.record import PointRecord, SearchRecord


@click.command(cls=GroupedCommand)
@click.argument("source", metavar="RECIPE|MODEL|PLAN", type=MODEL_PATH)
@option("-o", "--output", type=NEW_PATH, help="Plan folder, calibration/NAME.")
@option("--target-psnr", type=Number(), help="The fastest plan at least so close to the full run, in dB.")
@option("--max-latency-ms", type=Number(0), help="The closest plan that takes no longer for a whole run.")
@option("--pareto", is_flag=True, help="Show every point, beaten ones too.")
@option("--backend", help="On whose engines latency is measured.  [default: onnxruntime]")
@option("--batch-size", type=click.IntRange(1, MOST), default=1, show_default=True, help="Pictures per timed run.")
@option("--from-flops", advanced=True, is_flag=True, help="Take FLOPs for latency; nothing is timed.")
@option("--budget", "search__budget_minutes", type=Number(0), metavar="MINUTES", help="Time for the search.")
@option(
    "--baselines",
    "search__baselines",
    type=click.Choice(["none", "static", "all"]),
    help="What runs beside the plans: nothing, what a plan can express (the default), or Spectrum and cache-dit too.",
)
@recipe_options
@device_option
@json_option
def command(
    source: Path,
    output: Path | None,
    target_psnr: float | None,
    max_latency_ms: float | None,
    pareto: bool,
    backend: str | None,
    batch_size: int,
    from_flops: bool,
    as_json: bool,
    device: str,
    **options: Any,
) -> None:
    """Search for the best plan at a latency or a quality; without either, at half of the full run's latency.

    RECIPE is a TOML file with a [search] table, MODEL a diffusers folder. Latency is measured on engines, quality on
    seeds that the search did not see, and every baseline (fewer steps, a better solver, skipped steps, ...) runs beside
    the plans. A search that was stopped continues when it is started again. PLAN is a folder that this command wrote:
    it is shown, or with a target another of its points becomes its plan, without searching again.
    """
    from tc_deploy.backends.registry import DEFAULT
    from tc_deploy.bundle import canonical_json, reading
    from tc_deploy.calibrate.recipe import read_recipe
    from tc_deploy.plan import PLAN_FOLDER, SEARCH
    from tc_deploy.search.choose import Wish, choose_again, current_point
    from tc_deploy.search.plan_search import search_plan
    from tc_deploy.search.record import read_search

    if target_psnr is not None and max_latency_ms is not None:
        raise click.UsageError("--target-psnr and --max-latency-ms exclude each other; give one")
    overrides = recipe_overrides(options)
    wish = Wish(target_psnr_db=target_psnr, max_latency_ms=max_latency_ms)
    with reading(source, PLAN_FOLDER):  # which puts right what a process left that died while it replaced the folder
        finished = read_search(source) if (source / SEARCH).is_file() else None
    if finished is not None:
        if output is not None:
            raise click.UsageError(f"{source} is a finished search; leave out -o to choose another of its points")
        if from_flops or backend is not None or any(value is not None for value in overrides.values()):
            raise click.UsageError(f"{source} is a finished search; to search with other settings name its recipe")
        output = source
        record = finished if wish == Wish() else choose_again(source, wish)
    else:
        if output is None:
            raise click.UsageError("missing option -o, the plan folder to write")
        recipe = read_recipe(source, overrides)
        with progress_bar() as report:
            record = search_plan(
                recipe,
                output,
                wish,
                backend=backend or DEFAULT,
                batch_size=batch_size,
                from_flops=from_flops,
                device=device,
                report=report,
            )
    if as_json:
        click.echo(canonical_json(record.model_dump(mode="json")), nl=False)
        return
    _print(record, current_point(output, record), output, pareto=pareto)


def _print(record: SearchRecord, chosen: PointRecord, output: Path, *, pareto: bool) -> None:
    from tc_deploy.search.remarks import is_disturbed

    measured = record.latency_source == "measured"
    source = f"{record.backend} {record.backend_version}, batch {record.batch_size}" if measured else "FLOPs"
    click.echo(f"latency by {source}, on {record.hardware}; {record.confirmation_seeds} unseen seeds; {record.date}")
    click.echo(
        f"{'':2}{'latency':>8}{'±':>7}{'ms':>9}{'PSNR dB':>9}{'SSIM':>8}{'FD':>8}{'read':>7}{'exact':>7}"
        f"{'full+cached':>13}  kind: point"
    )
    for point in record.points:
        if not (pareto or point.on_front):
            continue
        quality = point.quality
        mark = ">" if point.name == chosen.name else "*" if point.on_front else " "
        columns = (
            _number(point.latency_ratio, 8, 3),
            _number(point.latency_iqr, 6, 3) + ("~" if is_disturbed(point) else " "),
            _number(point.latency_ms, 9, 1),
            _number(quality.psnr_db, 9, 1),
            _number(quality.ssim, 8, 4),
            _number(quality.frechet_distance, 8, 3),
            _number(quality.class_accuracy, 7, 3),
            _number(point.converged_psnr_db, 7, 1),
            f"{point.steps_full} + {point.steps_cached}".rjust(13),
        )
        kind = f"{point.kind} in PyTorch" if point.runtime == "pytorch" else point.kind
        click.echo(f"{mark:2}{''.join(columns)}  {kind}: {point.name}")
    click.echo(
        "* nothing on these engines is both faster and closer; > the plan; FD Frechet distance to the full run's"
    )
    click.echo(
        "  pictures; read: share that the classifier reads as asked; exact: PSNR to a run of four times the steps"
    )
    if any(map(is_disturbed, record.points)):
        click.echo("  ~ timed while something else ran, so that it says little")
    if measured and any(point.runtime == "pytorch" for point in record.points):
        click.echo("  in PyTorch: latency is a ratio to PyTorch's own full run, and not to that of the engines")
    for remark in record.remarks:
        click.echo(remark)
    click.echo(f"{output}: {chosen.kind}: {chosen.name}")


def _number(value: float | None, width: int, digits: int) -> str:
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width)
