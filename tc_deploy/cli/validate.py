"""``tc-deploy validate``: whether built engines compute what PyTorch did, and who is to blame where they do not."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tc_deploy.bundle import canonical_json, check_output
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MODEL_PATH, NEW_PATH, PATH, force_option, json_option
from tc_deploy.cli.progress import progress_bar
from tc_deploy.plan import places_read
from tc_deploy.validate.record import VALIDATION_FILE, DriftRecord, ValidationRecord, write_validation

FAILED_EXIT_CODE = 1
PLAIN_WIDTH = 140
SHOWN_STEPS = 9
"""Steps of a trajectory that the table shows; the JSON has all."""


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option("--backend", help="Which of the bundle's engines.")
@option(
    "--against",
    default="recorded",
    show_default=True,
    metavar="REFERENCE",
    help="recorded: what PyTorch made at export; torch: the checkpoint anew; onnxruntime; or another built backend.",
)
@option("--model", advanced=True, type=MODEL_PATH, help="The checkpoint, if it is not where the plan says.")
@option("-o", "--output", type=NEW_PATH, help="Also write the result as JSON, for the report.")
@force_option
@json_option
def command(
    bundle: Path, backend: str | None, against: str, model: Path | None, output: Path | None, force: bool, as_json: bool
) -> int:
    """Compare the engines of BUNDLE (engines/NAME) with a reference, on inputs as they occur while sampling.

    Every graph, the whole trajectory, and what each step reads. Exits with 1 if anything lies outside its tolerance.
    """
    from tc_deploy.validate.validation import validate_bundle

    if output is not None:
        reads = [*places_read(bundle), *([] if model is None else [model])]
        check_output(output, VALIDATION_FILE, reads=reads, force=force)
    with progress_bar() as report:
        record = validate_bundle(
            bundle, backend, against=against, model_path=model, progress=lambda what: report(what, 0, 1)
        )
    if output is not None:
        write_validation(record, output)
    if as_json:
        click.echo(canonical_json(record.model_dump(mode="json")), nl=False)
    else:
        _show(record)
    return 0 if record.passed else FAILED_EXIT_CODE


def _show(record: ValidationRecord) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        # Rich would take 80 columns, and cut what is to be searched.
        console.width = PLAIN_WIDTH
    engine = f"{record.backend} {record.backend_version} {record.precision}"
    console.print(f"{record.bundle}: {engine} against {record.against}; {record.hardware}, {record.date}", markup=False)
    console.print(f"on {record.sampled_on}", markup=False, soft_wrap=True)
    console.print(_variant_table(record))
    console.print(_drift_table(record.drift))
    lines = [*record.remarks()]
    for repeat in record.repeats:
        same = "the same bits" if repeat.equal else f"differ by up to {_number(repeat.max_abs)}"
        lines.append(f"{repeat.what}: {same}" + ("" if repeat.promised else " (not promised)"))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    drift = record.drift
    console.print(
        f"final picture of this run: {_number(drift.image_psnr_db, 1)} dB to PyTorch's under the plan,"
        f" {_number(drift.image_psnr_to_full_db, 1)} dB to the full run's (calibrate gives a mean of many pictures)",
        soft_wrap=True,
    )
    console.print(_verdict(record.passed))


def _variant_table(record: ValidationRecord) -> Table:
    table = Table(title="Graphs", title_justify="left")
    for head in ("graph", "steps", "worst output"):
        table.add_column(head, overflow="fold")
    for head in ("max abs", "median abs", "max rel", "median rel", "cosine", "SQNR dB"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("", no_wrap=True)
    for variant in record.variants:
        worst = variant.worst
        figures = worst.metrics
        absolute = (figures.max_abs, figures.median_abs, figures.max_rel, figures.median_rel)
        table.add_row(
            variant.name,
            ", ".join(map(str, variant.steps)),
            worst.name,
            *(_number(value) for value in absolute),
            _number(figures.cosine, 7),
            _number(figures.sqnr_db, 1),
            _verdict(variant.passed),
        )
    return table


def _drift_table(drift: DriftRecord) -> Table:
    table = Table("step", title="Drift: relative L2 of the latents, by cause", title_justify="left")
    columns = [drift.algorithm, drift.export, drift.engine, drift.precision, drift.total]
    for head in ("algorithm", "export", "engine", "precision", "all but algorithm"):
        table.add_column(head, justify="right")
    last = len(drift.total) - 1
    shown = sorted({round(index * last / (SHOWN_STEPS - 1)) for index in range(SHOWN_STEPS)})
    for step in shown:
        table.add_row(str(step), *("" if column is None else _number(column[step]) for column in columns))
    return table


def _verdict(passed: bool) -> str:
    return "[green]PASSED[/]" if passed else "[red]FAILED[/]"


def _number(value: float | None, decimals: int | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if decimals is None else f"{value:.{decimals}f}"
