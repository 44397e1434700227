"""The command line: finds the command, sets the log level, turns an error into one line and an exit code.

In: the words after ``tc-deploy``. Out: an exit code (``errors.py`` draws them). Never: imports a command's module, nor
anything heavy, before that command is called, so that ``--help`` is instant; computes anything itself.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from tc_deploy import __version__
from tc_deploy.errors import BackendError, Cancelled, TcDeployError, UsageError

PROGRAM = "tc-deploy"


class CommandEntry(NamedTuple):
    """A command that is imported when it is called."""

    target: str
    """``module:attribute`` of a click command."""
    help: str
    """The line in the list of commands, kept here so that the list needs no import."""


COMMANDS = {
    "calibrate": CommandEntry("tc_deploy.cli.calibrate:command", "Make a plan from a checkpoint and a recipe."),
    "plan": CommandEntry("tc_deploy.cli.plan:command", "Search for the best plan at a latency or a quality."),
    "export": CommandEntry("tc_deploy.cli.export:command", "Export a plan and its checkpoint as ONNX graphs."),
    "build": CommandEntry("tc_deploy.cli.build:command", "Build engines for this machine from exported graphs."),
    "validate": CommandEntry("tc_deploy.cli.validate:command", "Compare built engines with PyTorch or each other."),
    "generate": CommandEntry("tc_deploy.cli.generate:command", "Make images with built engines."),
    "inspect": CommandEntry("tc_deploy.cli.inspect:command", "Show what a plan or a bundle holds."),
    "report": CommandEntry("tc_deploy.cli.report:command", "Draw a plan or a bundle as one HTML page."),
    "sign": CommandEntry("tc_deploy.cli.sign:sign", "Sign a bundle and the engines built in it."),
    "verify": CommandEntry("tc_deploy.cli.sign:verify", "Check who signed a bundle, and that it is unchanged."),
    "doctor": CommandEntry("tc_deploy.cli.doctor:command", "Say what this machine can run, and why not the rest."),
    "bench": CommandEntry("tc_deploy.cli.bench:command", "Time full and cached engines, and a process's start."),
}


class LazyGroup(click.Group):
    """A group whose listed commands are placeholders; the real one is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the base class gives it
        """The commands in the order in which a user needs them."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` name, and import it."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None or placeholder is None:
            return name, placeholder, rest
        return name, command_from_target(COMMANDS[name].target), rest


def command_from_target(target: str) -> click.Command:
    """Import the click command that ``module:attribute`` names."""
    module, _, attribute = target.partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name, short_help=entry.help) for name, entry in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 validation failed, 2 usage, 3 model, 4 plan, 5 bundle, 6 export, 7 backend, "
    "8 storage, 9 not finite, 70 a defect of tc-deploy, 130 interrupted.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Say more; twice: libraries too, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def group(verbose: int, quiet: bool) -> None:
    """Token-cached Diffusion Transformers as compiled engines.

    checkpoint -> calibrate -> plan -> export -> ONNX bundle -> build -> engines -> generate
    """
    if quiet and verbose:
        raise click.UsageError("-v and -q exclude each other")
    _start_logging(-1 if quiet else verbose)


def _start_logging(verbosity: int) -> None:
    """Send the log to stderr: -1 errors, 0 our progress, 1 our details, 2 everybody's details."""
    from rich.console import Console
    from rich.logging import RichHandler

    details = verbosity > 0
    console = Console(stderr=True)
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=details, show_level=details, show_path=False)
    # In a file Rich would fill every line up with spaces.
    in_full = details and not console.is_terminal
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s" if in_full else "%(message)s"))
    handler.set_name(PROGRAM)
    ours, others = {
        -1: (logging.ERROR, logging.ERROR),
        0: (logging.INFO, logging.WARNING),
        1: (logging.DEBUG, logging.INFO),
    }.get(verbosity, (logging.DEBUG, logging.DEBUG))
    root = logging.getLogger()
    for earlier in [earlier for earlier in root.handlers if earlier.get_name() == PROGRAM]:
        root.removeHandler(earlier)  # a second call of main in one process must not print every line twice
    root.addHandler(handler)
    root.setLevel(others)
    logging.getLogger("tc_deploy").setLevel(ours)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code.
    """
    try:
        result = group.main(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except TcDeployError as error:
        return _fail(error, str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else PROGRAM
        return _fail(error, f"{error.format_message()} (see: {command} --help)", UsageError.exit_code)
    except click.ClickException as error:
        return _fail(error, error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        return _fail(error, "interrupted", Cancelled.exit_code)
    except ModuleNotFoundError as error:
        return _fail_for_module(error)
    except BrokenPipeError:
        # The reader of our output has gone. What is still buffered must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TcDeployError.exit_code
    return result if isinstance(result, int) else 0


def _fail(error: BaseException, message: str, exit_code: int) -> int:
    logging.getLogger().debug("The error came from here:", exc_info=error)
    click.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return exit_code


def _fail_for_module(error: ModuleNotFoundError) -> int:
    """Name the extra that brings a missing library; any other missing module is our own bug and keeps its traceback."""
    from tc_deploy.doctor import EXTRA_BY_MODULE, install_command

    library = (error.name or "").partition(".")[0]
    if library not in EXTRA_BY_MODULE:
        raise error
    cure = install_command(EXTRA_BY_MODULE[library])
    return _fail(error, f"this command needs {library}, which is not installed: {cure}", BackendError.exit_code)
