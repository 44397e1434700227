"""``tc-deploy bench``: how fast a bundle's engines are here."""

from __future__ import annotations

from pathlib import Path

import click

from tc_deploy.bundle import canonical_json
from tc_deploy.cli.progress import progress_bar


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", help="Which of the bundle's engines.")
@click.option("--batch-size", type=int, help="Pictures that run together.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Times each variant is run.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def command(bundle: Path, backend: str | None, batch_size: int | None, rounds: int, as_json: bool) -> None:
    """Time the full and the cached engines of BUNDLE (engines/NAME) in turn, and the start of a fresh process.

    Compile efficiency is a cached variant's speed-up in time over its speed-up in FLOPs.
    """
    from tc_deploy.bench.measure import bench_bundle

    with progress_bar() as report:
        facts = bench_bundle(bundle, backend, batch_size, rounds, report)
    if as_json:
        click.echo(canonical_json(facts), nl=False)
        return
    click.echo(f"{facts['bundle']} with {facts['backend']}, batch {facts['batch_size']}, on {facts['hardware']}")
    click.echo(f"{'variant':<10}{'median ms':>11}{'min ms':>9}{'time':>8}{'FLOPs':>8}{'efficiency':>12}")
    for name, row in facts["variants"].items():
        ratios = ("time_ratio", "flops_ratio", "compile_efficiency")
        text = "".join(
            f"{row[ratio]:>{width}.3f}" for ratio, width in zip(ratios, (8, 8, 12), strict=True) if ratio in row
        )
        click.echo(f"{name:<10}{row['median_ms']:>11.2f}{row['min_ms']:>9.2f}{text}")
    start = facts["start_up"]
    torch = "imports torch" if start["torch_imported"] else "no torch"
    click.echo(
        f"fresh process: loaded after {start['load_s']:.2f} s, first step done after {start['first_step_s']:.2f} s,"
        f" {start['rss_mib']:.0f} MiB resident, {torch}"
    )
