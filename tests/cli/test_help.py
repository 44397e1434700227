"""What --help shows: every option once, in its group, on one screen."""

import os
import re
import subprocess
import sys

import click
import pytest

from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.help import ADVANCED, COMMON, GroupedCommand, option
from tc_deploy.cli.program import command_from_target

COLUMNS, LINES = 80, 50
"""Of a terminal."""


def help_of(command: click.Command, name: str) -> str:
    return command.get_help(click.Context(command, info_name=f"tc-deploy {name}", terminal_width=COLUMNS))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_s_help_fits_a_screen(name: str) -> None:
    lines = help_of(command_from_target(COMMANDS[name].target), name).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_stands_there_once(name: str) -> None:
    command = command_from_target(COMMANDS[name].target)
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(command, name), re.MULTILINE)
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    declared = [next(word for word in one.opts if word.startswith("--")) for one in options if not one.hidden]
    assert sorted(shown) == sorted([*declared, "--help"])


def test_groups_and_ranges() -> None:
    @click.command(cls=GroupedCommand)
    @click.argument("folder")
    @option("--rare", advanced=True, type=click.IntRange(0, 5), help="Seldom.")
    @option("--usual", type=click.IntRange(1, 2**31 - 1), help="Often.")
    def command() -> None:
        """Do it."""

    common, advanced = help_of(command, "x").split(f"\n{ADVANCED}:\n")
    assert f"\n{COMMON}:\n  --usual INTEGER  Often.\n" in common
    assert advanced.split() == ["--rare", "INTEGER", "Seldom.", "[0<=x<=5]"]
    assert "folder" not in common.partition(f"{COMMON}:")[2].lower()


def completed(instruction: str, **words: str) -> subprocess.CompletedProcess[str]:
    """What a shell's own completion calls."""
    environment = {**os.environ, "_TC_DEPLOY_COMPLETE": instruction, **words}
    program = [sys.executable, "-c", "from tc_deploy.cli import main; main()"]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str) -> None:
    answer = completed(f"{shell}_source")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"_TC_DEPLOY_COMPLETE={shell}_complete" in answer.stdout


def test_commands_options_and_choices_are_completed() -> None:
    for words, place, expected in (
        ("tc-deploy bui", 1, "plain,build\n"),
        ("tc-deploy build --back", 2, "plain,--backend\n"),
        ("tc-deploy export --precision f", 3, "plain,fp32\nplain,fp16\n"),
    ):
        answer = completed("bash_complete", COMP_WORDS=words, COMP_CWORD=str(place))
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, expected, "")
