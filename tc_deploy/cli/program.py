"""The program: finds the command, sets the log level, turns whatever comes out into an exit code.

In: the words after ``tc-deploy``. Out: an exit code. Never: imports a command's module, nor anything heavy, before that
command is called, so that ``--help`` is instant; computes anything itself.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from tc_deploy import __version__
from tc_deploy.cli import PROGRAM
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.failure import show_failure
from tc_deploy.errors import UsageError, first_line


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
    "8 storage, 9 not finite, 10 memory, 70 a defect of tc-deploy, 129 hung up, 130 interrupted, 141 the reader of the "
    "output has left, 143 terminated.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Say more, and where a defect lies; twice: libraries too, and all tracebacks.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def group(verbose: int, quiet: bool) -> None:
    """Token-cached Diffusion Transformers as compiled engines.

    checkpoint -> calibrate -> plan -> export -> ONNX bundle -> build -> engines -> generate
    """
    if quiet and verbose:
        raise click.UsageError("-v and -q exclude each other")
    _start_logging(-1 if quiet else verbose)


class _Formatter(logging.Formatter):
    """A log line; of a traceback that a library logs, the line that it ends in, unless details are asked for."""

    def __init__(self, style: str, *, tracebacks: bool) -> None:
        super().__init__(style)
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """As the base class does."""
        if self._tracebacks or record.exc_info is None or (error := record.exc_info[1]) is None:
            return super().format(record)
        # A copy: the text of a traceback is kept in the record, which all handlers share.
        line = super().format(logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None}))
        return f"{line}: {type(error).__name__}: {first_line(error)}"


def _start_logging(verbosity: int) -> None:
    """Send the log to stderr: -1 errors, 0 our progress, 1 our details, 2 everybody's details."""
    from rich.console import Console
    from rich.logging import RichHandler

    ours, others = {
        -1: (logging.ERROR, logging.ERROR),
        0: (logging.INFO, logging.WARNING),
        1: (logging.DEBUG, logging.INFO),
    }.get(verbosity, (logging.DEBUG, logging.DEBUG))
    details = verbosity > 0
    console = Console(stderr=True)
    if console.is_terminal:
        rich = RichHandler(console=console, show_time=details, show_level=details, show_path=False)
        _send_log_to(rich, "%(message)s", details=details)
    else:  # in a file Rich would fill every line up with spaces
        style = "%(asctime)s %(levelname)s %(message)s" if details else "%(message)s"
        _send_log_to(logging.StreamHandler(), style, details=details)
    logging.getLogger().setLevel(others)
    logging.getLogger("tc_deploy").setLevel(ours)


def _send_log_to(handler: logging.Handler, style: str, *, details: bool) -> None:
    """Send the log there and, of what an earlier call in this process named, nowhere else."""
    root = logging.getLogger()
    for earlier in [earlier for earlier in root.handlers if earlier.get_name() == PROGRAM]:
        root.removeHandler(earlier)
    handler.set_name(PROGRAM)
    handler.setFormatter(_Formatter(style, tracebacks=details))
    root.addHandler(handler)


def run(arguments: Sequence[str]) -> int:
    """Run the command line in this process.

    Args:
        arguments: the words after the program's name.

    Returns:
        The exit code; an error has been shown on stderr.
    """
    # Until the options say more; a command is imported before that, and its libraries may have something to log.
    _send_log_to(logging.StreamHandler(), "%(message)s", details=False)
    try:
        _check_words(arguments)
        result = _result(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends in one line and an exit code
        return show_failure(error)
    return result if isinstance(result, int) else 0


def _result(arguments: Sequence[str]) -> object:
    """What the command returns, or its exit code.

    ``group.main`` would add a blank line to Ctrl-C, and take a file that ends too early for it.
    """
    if f"_{PROGRAM.upper().replace('-', '_')}_COMPLETE" in os.environ:
        try:
            group.main(list(arguments), prog_name=PROGRAM)
        except SystemExit as left:
            return left.code
    try:
        with group.make_context(PROGRAM, list(arguments)) as context:
            return group.invoke(context)
    except click.exceptions.Exit as left:
        return left.exit_code


def _check_words(arguments: Sequence[str]) -> None:
    """Refuse what is no text: no document could hold it, and most libraries take no path with it.

    Raises:
        UsageError: an argument cannot be decoded, or holds a NUL.
    """
    for number, word in enumerate(arguments, start=1):
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(
                f"argument {number}, {word!a}, is no text in {sys.getfilesystemencoding()}; rename the file, or"
                " set LC_ALL to a locale that the text is written in, as C.UTF-8"
            )
        if "\0" in word:
            raise UsageError(f"argument {number}, {word!a}, holds a NUL character; leave it out")
