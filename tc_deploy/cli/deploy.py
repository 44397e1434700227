"""``tc-deploy deploy``: a checkpoint to validated engines, by the other commands, which are shown."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tc_deploy.backends.registry import BACKENDS, DEFAULT
from tc_deploy.bundle import PLAN_DOCUMENT
from tc_deploy.cli import PROGRAM
from tc_deploy.cli.calibrate import command as calibrate
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MODEL_PATH, NEW_PATH
from tc_deploy.cli.program import command_from_target
from tc_deploy.errors import UsageError
from tc_deploy.plan import load_plan
from tc_deploy.types import Precision

PLANS = Path("calibration")
"""Where plans are written, as everywhere in the documentation."""
_OWN = {"source", "output", "as_json"}
_SHOWN = {"prompt", "prompts", "sampling__num_inference_steps", "sampling__guidance_scale", "height", "width"}
"""Calibrate's options that the help names; it takes the others too."""


@click.command(cls=GroupedCommand)
@click.argument("source", metavar="MODEL|RECIPE|PLAN", type=MODEL_PATH)
@option("-o", "--output", required=True, type=NEW_PATH, help="Bundle folder, engines/NAME.")
@option("--plan", type=NEW_PATH, help=f"Plan folder to write; without it {PLANS}/NAME.")
@option("--backend", default=DEFAULT, show_default=True, help=f"Engine kind: {', '.join(BACKENDS)}.")
@option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.FP32.value,
    show_default=True,
    help="As for export.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    source: Path,
    output: Path,
    plan: Path | None,
    backend: str,
    precision: str,
    **calibrates: Any,  # noqa: ARG001 - they are read from the context, which knows which were given
) -> int:
    """Calibrate, export, build and validate in one go.

    MODEL is a diffusers folder, RECIPE a TOML file; a PLAN folder is taken as it is. Decoder and text encoders are
    exported where the pipeline has them. Each command is shown before it runs, to be run by itself another time. It
    takes every option of calibrate.
    """
    from tc_deploy.export.parts import parts_beside

    given = list(_words_given(context))
    if (source / PLAN_DOCUMENT).is_file():
        if given or plan is not None:
            raise UsageError(f"{source} is a plan already, so {(given or ['--plan'])[0]} changes nothing; leave it out")
        plan = source
    else:
        plan = plan or PLANS / output.name
        _run("calibrate", source, *given, "-o", plan)
    options_of_parts = ("--with-decoder", "--with-text-encoder")
    parts = [word for word, there in zip(options_of_parts, parts_beside(load_plan(plan)[0]), strict=True) if there]
    precise = () if precision == Precision.FP32 else ("--precision", precision)
    _run("export", plan, "-o", output, *parts, *precise)
    engine = () if backend == DEFAULT else ("--backend", backend)
    _run("build", output, *engine)
    return _run("validate", output, *engine)


def _words_given(context: click.Context) -> Iterator[str]:
    """Calibrate's options as they were given here."""
    for parameter in _CALIBRATES:
        value = context.params[str(parameter.name)]
        if context.get_parameter_source(str(parameter.name)) is not ParameterSource.COMMANDLINE:
            continue
        for one in value if parameter.multiple else [value]:
            yield from (parameter.opts[0], *map(str, one if isinstance(one, tuple) else [one]))


def _run(name: str, *words: object) -> int:
    """Run a command of the program, shown as it could be typed; returns its exit code."""
    texts = [str(word) for word in words]
    click.echo(f"$ {shlex.join([PROGRAM, name, *texts])}")
    one = command_from_target(COMMANDS[name].target)
    with one.make_context(f"{PROGRAM} {name}", texts) as context:
        result = one.invoke(context)
    return result if isinstance(result, int) else 0


def _calibrates() -> Iterator[click.Option]:
    """Calibrate's options, those apart that this command has itself or that few need hidden."""
    for parameter in calibrate.params:
        if isinstance(parameter, click.Option) and parameter.name not in _OWN:
            shown = copy.copy(parameter)
            shown.hidden = parameter.name not in _SHOWN
            shown.callback = None  # it is called where the words are parsed again
            yield shown


_CALIBRATES = tuple(_calibrates())
command.params += _CALIBRATES
