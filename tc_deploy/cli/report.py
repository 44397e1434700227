"""``tc-deploy report``: a plan, its baselines and its pictures as one page."""

from __future__ import annotations

from pathlib import Path

import click

from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import NEW_PATH, PATH, force_option
from tc_deploy.errors import UsageError


@click.command(cls=GroupedCommand)
@click.argument("path", type=PATH)
@option("-o", "--output", required=True, type=NEW_PATH, help="The page, like report.html.")
@force_option
@option("--validation", type=PATH, help="Also draw what tc-deploy validate -o wrote of this bundle.")
def command(path: Path, output: Path, validation: Path | None, force: bool) -> None:
    """Draw PATH (calibration/NAME or engines/NAME) as one HTML page that needs no other file and no network.

    Schedule, kept tokens and provenance; and where a search lies beside the plan, the Pareto picture with the
    baselines, the drift, the samples and all points.
    """
    from tc_deploy.report.page import write_report

    if validation is not None and validation.is_dir():
        raise UsageError(
            f"--validation {validation}: expected the file that tc-deploy validate -o wrote, found a folder"
        )

    size_bytes = write_report(path, output, validation, force=force)
    click.echo(f"{output}: {size_bytes / 2**10:.0f} KiB")
