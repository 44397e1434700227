"""``tc-deploy bench``: how fast a bundle's engines are here. The tables are Markdown, to paste in a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tc_deploy.bench.report import FULL_RUN, PLAN_RUN
from tc_deploy.bundle import canonical_json
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MOST, PATH, json_option
from tc_deploy.cli.progress import progress_bar


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option("--backend", help="Which of the bundle's engines.")
@option(
    "--against", multiple=True, metavar="BUNDLE[:BACKEND]", help="Measure this too, in turn with the first; repeat it."
)
@option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1, MOST),
    multiple=True,
    help="Pictures that run together; repeat it for several.",
)
@option(
    "--rounds", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Runs of each kind per contender."
)
@json_option
def command(
    bundle: Path,
    backend: str | None,
    against: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    as_json: bool,
) -> None:
    """Time whole sampling runs of BUNDLE (engines/NAME), under its plan and with every step full.

    Also every graph in them, the host's share, and a fresh process's start and memory. In each round every
    contender makes each kind of run once, in a changing order; ratios are taken round by round. Without :BACKEND,
    --against takes the backend of BUNDLE.
    """
    from tc_deploy.bench.measure import bench_bundles

    with progress_bar() as report:
        facts = bench_bundles(bundle, backend, against, batch_sizes, rounds=rounds, progress=report)
    if as_json:
        click.echo(canonical_json(facts), nl=False)
        return
    contenders = facts["contenders"]
    versions = sorted({f"{one['backend']} {one['backend_version']} ({one['options_in_words']})" for one in contenders})
    click.echo(", ".join([facts["hardware"], *versions, facts["made_by"], facts["date"], f"{rounds} rounds in turn"]))
    _show_runs(contenders, rounds, compared=bool(against))
    _show_variants(contenders)
    _show_processes(contenders)


def _show_runs(contenders: list[dict[str, Any]], rounds: int, *, compared: bool) -> None:
    rows = []
    # A percentile of fewer values would be the largest of them under another name.
    tail = {f"p{percent} ms": f"p{percent}_ms" for percent in (90, 99) if rounds * (100 - percent) >= 100}
    shown = {"p50 ms": "p50_ms", "IQR ms": "iqr_ms", **tail} | ({} if "p99 ms" in tail else {"worst ms": "max_ms"})
    for contender in contenders:
        total = contender["steps_full"] + contender["steps_cached"]
        steps = {PLAN_RUN: f"{contender['steps_full']} + {contender['steps_cached']}", FULL_RUN: f"{total} + 0"}
        for kind, run in contender["runs"].items():
            times = [f"{run[name]:.1f}" for name in shown.values()]
            ratios = [_spread(run["ratio_to_full"]), *([_spread(run["ratio_to_first"])] if compared else [])]
            what = [*_names(contender), contender["precision"], kind, steps[kind]]
            rows.append([*what, *times, f"{run['images_per_s']:.2f}", *ratios])
    head = ["engines", "batch", "precision", "run", "full + cached", *shown, "pictures/s", "to full (IQR)"]
    _show_table([*head, *(["to first (IQR)"] if compared else [])], rows)


def _show_variants(contenders: list[dict[str, Any]]) -> None:
    rows, notes = [], []
    for contender in contenders:
        for name, variant in contender["variants"].items():
            times = [f"{variant[name]:.3f}" for name in ("p50_ms", "iqr_ms")]
            ratios = [_number(variant[name]) for name in ("time_ratio", "flops_ratio", "compile_efficiency")]
            rows.append([*_names(contender), name, str(variant["calls"]), *times, *ratios])
            if variant["note"]:
                notes.append(f"{name}: {variant['note']}")
    _show_table(["engines", "batch", "graph", "calls", "p50 ms", "IQR ms", "time", "FLOPs", "efficiency"], rows)
    click.echo()
    click.echo("time, FLOPs: to the full step's, which also writes the caches; efficiency: FLOPs / time")
    if any((row["compile_efficiency"] or 0) > 1 for one in contenders for row in one["variants"].values()):
        click.echo("an efficiency above 1 comes of disturbed rounds, or of caches that only the full step writes")
    for note in dict.fromkeys(notes):
        click.echo(f"no efficiency for {note}")


def _show_processes(contenders: list[dict[str, Any]]) -> None:
    rows = []
    for contender in contenders:
        start = contender["start_up"]
        times = [f"{start[name]:.2f}" for name in ("load_s", "first_step_s")]
        memory = [f"{start[name]:.0f}" for name in ("resident_mib", "peak_mib")]
        share = f"{100 * contender['host_share']['median']:.1f} %"
        rows.append([*_names(contender), share, *times, *memory, "yes" if start["torch_imported"] else "no"])
    head = ["host share", "loaded after s", "first step after s", "resident MiB", "peak MiB", "imports torch"]
    _show_table(["engines", "batch", *head], rows)


def _names(contender: dict[str, Any]) -> list[str]:
    return [f"{contender['bundle']}:{contender['backend']}", str(contender["batch_size"])]


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['iqr']:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _show_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, padded so that it also reads well as it is; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numbers = [all(cell[:1].isdigit() or not cell for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, numbers, strict=True)]
    click.echo()
    for line in (head, rule, *rows):
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ]
        click.echo(f"| {' | '.join(cells)} |")
