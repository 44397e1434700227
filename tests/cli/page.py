"""Write docs/cli.md from what the commands declare to click.

python tests/cli/page.py        # or: make docs
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from tc_deploy.cli import PROGRAM
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.program import command_from_target, group

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Command line

This page is written by `make docs` from the commands' own declarations. Do not edit it.
`tc-deploy COMMAND --help` shows the same in a terminal.

| command | does |
|---|---|
"""
COMPLETION = """## Shell completion

click completes commands and options. Put the line of your shell into its start file:

| shell | file | line |
|---|---|---|
| bash | `~/.bashrc` | `eval "$(_TC_DEPLOY_COMPLETE=bash_source tc-deploy)"` |
| zsh | `~/.zshrc` | `eval "$(_TC_DEPLOY_COMPLETE=zsh_source tc-deploy)"` |
| fish | `~/.config/fish/completions/tc-deploy.fish` | `_TC_DEPLOY_COMPLETE=fish_source tc-deploy \\| source` |
"""


def table(heads: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A Markdown table of two columns, the first as code."""
    lines = [f"| {' | '.join(heads)} |", "|---|---|"]
    lines += [f"| `{escaped(code)}` | {escaped(words)} |" for code, words in rows]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text for a cell on one line."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def records(command: click.Command, context: click.Context, *, advanced: bool) -> Iterator[tuple[str, str]]:
    """What the help says of each option of a group."""
    options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    for option in options:
        if getattr(option, "advanced", False) == advanced and (record := option.get_help_record(context)) is not None:
            yield record


def section(name: str, command: click.Command) -> str:
    """A command's usage, help and options."""
    context = click.Context(command, info_name=f"{PROGRAM} {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    words = inspect.cleandoc(command.help or "")
    text = f"## {name}\n\n    {PROGRAM} {name} {usage}\n\n{words}\n"
    for head, advanced in (("option", False), ("advanced option", True)):
        rows = list(records(command, context, advanced=advanced))
        text += f"\n{table((head, 'meaning'), rows)}" if rows else ""
    return text


def page() -> str:
    """The whole page."""
    commands = {name: command_from_target(entry.target) for name, entry in COMMANDS.items()}
    listed = "".join(f"| [`{name}`](#{name}) | {entry.help} |\n" for name, entry in COMMANDS.items())
    context = click.Context(group, info_name=PROGRAM)
    before = table(("before the command", "meaning"), records(group, context, advanced=False))
    kind, _, codes = (group.epilog or "").partition(": ")
    rows = (code.split(" ", 1) for code in codes.rstrip(".").split(", "))
    exits = f"## {kind}\n\n" + table(("code", "meaning"), ((code, words) for code, words in rows))
    sections = [section(name, command) for name, command in commands.items()]
    return HEAD + "\n".join([listed, before, *sections, exits, COMPLETION])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
