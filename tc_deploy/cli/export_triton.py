"""``tc-deploy export-triton``: a bundle as a model of Triton Inference Server."""

from __future__ import annotations

import re
from pathlib import Path

import click

from tc_deploy.bundle import check_output, reading, real_path, write_output
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import NEW_PATH, PATH, force_option
from tc_deploy.cli.serve import MOST_QUEUE, MOST_SLOTS
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BUNDLE_FOLDER, read_manifest
from tc_deploy.plan import places_read

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option("-o", "--output", required=True, type=NEW_PATH, help="Model repository; the model gets a folder in it.")
@option("--name", help="Of the model; the bundle's if not given.")
@option("--slots", type=click.IntRange(1, MOST_SLOTS), default=4, show_default=True, help="As for serve.")
@option("--queue", type=click.IntRange(0, MOST_QUEUE), default=16, show_default=True, help="As for serve.")
@option("--backend", help="Which of the bundle's engines.")
@force_option
def command(
    bundle: Path, output: Path, name: str | None, slots: int, queue: int, backend: str | None, force: bool
) -> None:
    """Write a model repository for Triton Inference Server that runs BUNDLE (engines/NAME) where it lies.

    Triton's Python must have tc-deploy and the engines' library. Requests are for one picture each, and share calls of
    the engine step by step, as with serve; clients stream, since the model is decoupled.
    """
    from tc_deploy.scale.triton_repository import TRITON_FILE, TritonSettings, triton_files

    name = real_path(bundle).name if name is None else name
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise UsageError(f"--name must be letters, digits, dots, - and _, found {name!r}; name the model with --name")
    with reading(bundle, BUNDLE_FOLDER):
        manifest = read_manifest(bundle)
    settings = TritonSettings(name=name, slots=slots, queue=queue, backend=backend)
    files = triton_files(bundle.absolute(), manifest, settings)
    for path in files:
        check_output(output / path, TRITON_FILE, reads=places_read(bundle), force=force)
    for path, text in files.items():
        write_output(output / path, text.encode())
    click.echo(f"{output / name}: a model of {bundle.absolute()}; tritonserver --model-repository {output}")
