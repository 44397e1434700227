"""The list of commands: what is imported for each, and the line that says what it does.

In: nothing. Out: a dict that the program and its page of documentation read. Never: imports a command.
"""

from __future__ import annotations

from typing import NamedTuple


class CommandEntry(NamedTuple):
    """A command that is imported when it is called."""

    target: str
    """``module:attribute`` of a click command."""
    help: str
    """The line in the list of commands, kept here so that the list needs no import."""


COMMANDS = {
    "deploy": CommandEntry("tc_deploy.cli.deploy:command", "From a checkpoint to validated engines in one go."),
    "calibrate": CommandEntry("tc_deploy.cli.calibrate:command", "Make a plan from a checkpoint and a recipe."),
    "plan": CommandEntry("tc_deploy.cli.plan:command", "Search for the best plan at a latency or a quality."),
    "export": CommandEntry("tc_deploy.cli.export:command", "Export a plan and its checkpoint as ONNX graphs."),
    "build": CommandEntry("tc_deploy.cli.build:command", "Build engines for this machine from exported graphs."),
    "validate": CommandEntry("tc_deploy.cli.validate:command", "Compare built engines with PyTorch or each other."),
    "generate": CommandEntry("tc_deploy.cli.generate:command", "Make images with built engines."),
    "serve": CommandEntry("tc_deploy.cli.serve:command", "Serve built engines over HTTP, as OpenAI's images API."),
    "export-triton": CommandEntry("tc_deploy.cli.export_triton:command", "Write a model repository for Triton."),
    "inspect": CommandEntry("tc_deploy.cli.inspect:command", "Show what a plan or a bundle holds."),
    "report": CommandEntry("tc_deploy.cli.report:command", "Draw a plan or a bundle as one HTML page."),
    "sign": CommandEntry("tc_deploy.cli.sign:sign", "Sign a bundle and the engines built in it."),
    "verify": CommandEntry("tc_deploy.cli.sign:verify", "Check who signed a bundle, and that it is unchanged."),
    "doctor": CommandEntry("tc_deploy.cli.doctor:command", "Say what this machine can run, and why not the rest."),
    "bench": CommandEntry("tc_deploy.cli.bench:command", "Time full and cached engines, and a process's start."),
}
