"""``tc-deploy build``: an exported bundle to engines of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from tc_deploy.backends.registry import DEFAULT
from tc_deploy.cli.progress import log_step


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default=DEFAULT, show_default=True, help="Engine kind.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="CPU threads; 0: all cores.")
@click.option("--precision", help="What openvino computes in: f32, bf16 or f16; the graphs' own if not given.")
def command(bundle: Path, backend: str, threads: int, precision: str | None) -> None:
    """Build engines from BUNDLE (engines/NAME) and run each once."""
    from tc_deploy.backends.build import build_target

    options = {"threads": threads, **({} if precision is None else {"precision": precision})}
    target = build_target(bundle, backend, options, progress=log_step)
    click.echo(f"{bundle / backend}: built with {target.backend} {target.backend_version}")
