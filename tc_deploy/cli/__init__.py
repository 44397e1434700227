"""The command line's door: the list of commands, and ``main``.

In: the words after ``tc-deploy``. Out: an exit code (``errors.py`` draws them). Never: imports click or a command's
module before ``main`` watches for signals, so that Ctrl-C ends in one line from the first moment on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name, for a caller that goes on afterwards; None takes them from
            ``sys.argv`` and ends the process.

    Returns:
        The exit code.
    """
    try:
        if arguments is None:
            from tc_deploy.cli.process import run_as_process

            run_as_process()
        from tc_deploy.cli.program import run

        return run(arguments)
    except KeyboardInterrupt:  # before anything watches for it
        return 130
