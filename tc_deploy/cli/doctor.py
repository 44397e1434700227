"""``tc-deploy doctor``: what this machine can run, as tables, as plain lines in a pipe, or as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from tc_deploy.bundle import canonical_json
from tc_deploy.cli.help import GroupedCommand
from tc_deploy.cli.options import json_option
from tc_deploy.doctor import Facts, Report, Status, examine
from tc_deploy.errors import BackendError

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {Status.OK: "green", Status.MISSING: "yellow", Status.BROKEN: "red"}


@click.command(cls=GroupedCommand)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Say what this machine can run, and why not the rest.

    The exit code is 7 if it cannot even run the default path, ONNX Runtime on the CPU.
    """
    report = examine()
    if as_json:
        click.echo(canonical_json(dataclasses.asdict(report)), nl=False)
    else:
        _show(report)
    if not report.can_run:
        context.exit(BackendError.exit_code)


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        _show_tables(console, report)
        return
    for name, value in _machine_lines(report):
        click.echo(f"{name}: {value}")
    for stage in report.stages:
        click.echo(f"{stage.status}: {stage.name}: {stage.detail}")
        if stage.cure:
            click.echo(f"  cure: {stage.cure}")
    for problem in report.problems:
        click.echo(f"problem: {problem}")


def _show_tables(console: Console, report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    machine = Table(show_header=False, box=None)
    for name, value in _machine_lines(report):
        machine.add_row(Text(name, style="bold"), Text(value))
    stages = Table("stage", "", "why, and what cures it")
    for stage in report.stages:
        why = Text(stage.detail + (f"\n{stage.cure}" if stage.cure else ""))
        stages.add_row(Text(stage.name), Text(stage.status, style=_COLOURS[stage.status]), why)
    console.print(machine)
    console.print(stages)
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="red"))


def _machine_lines(report: Report) -> list[tuple[str, str]]:
    facts = report.facts
    features = f" ({' '.join(facts.cpu_features)})" if facts.cpu_features else ""
    return [
        ("tc-deploy", report.tc_deploy),
        ("Python", f"{facts.python} on {facts.system}"),
        ("CPU", f"{facts.cpu}, {facts.cores} cores{features}"),
        ("memory", f"{facts.memory_mib} MiB" if facts.memory_mib is not None else "unknown"),
        *(("GPU", line) for line in _gpu_lines(facts)),
    ]


def _gpu_lines(facts: Facts) -> list[str]:
    return [
        f"{gpu.name}, {gpu.memory_mib or 'unknown'} MiB, capability {gpu.compute_capability}, driver {gpu.driver}"
        for gpu in facts.gpus
    ] or [facts.gpu_note]
