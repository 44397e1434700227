"""``--config FILE``: a command's options from a TOML file, each under its long name.

In: the file and the command's own declarations. Out: defaults for click, which checks them as it checks what is typed;
what is typed stands above them. Never: knows what an option means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tc_deploy.bundle import path_beside, read_toml
from tc_deploy.cli.help import option
from tc_deploy.cli.options import PATH, Command
from tc_deploy.errors import UsageError
from tc_deploy.plan import RANDOM

_NONE = ("config", "json")
"""Options that a file does not hold: where it is, and what the one who calls wants to read."""


def config_option(command: Command) -> Command:
    """Give a command ``--config``."""
    return option(
        "--config",
        advanced=True,
        type=PATH,
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_take,
        help="Options from a TOML file, as static_batch = 4; what is typed stands above it.",
    )(command)


def _take(context: click.Context, parameter: click.Parameter, file: Path | None) -> None:  # noqa: ARG001 - click's
    """Make what a file holds the defaults of a command.

    Raises:
        UsageError: the file is missing or no TOML, a key is no option, or a value is no option's.
    """
    if file is None:
        return
    known = dict(_known(context.command))
    defaults: dict[str, Any] = {}
    for key, value in read_toml(file).items():
        if key not in known:
            raise UsageError(f"{file}: {key}: unknown key; known here: {', '.join(sorted(known))}")
        typed = _as_typed(known[key], value, file, key)
        try:
            known[key].type_cast_value(context, typed)
        except click.BadParameter as error:
            raise UsageError(f"{file}: {key}: {error.message}") from None
        defaults[str(known[key].name)] = typed
    context.default_map = defaults


def _known(command: click.Command) -> Iterator[tuple[str, click.Option]]:
    """The options of a command by the key that says the same: the long name, with underscores."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            key = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
            if key not in _NONE:
                yield key, parameter


def _as_typed(option: click.Option, value: Any, file: Path, key: str) -> Any:
    """A value as it would be typed, so that click takes and refuses the same; a path is relative to the file.

    Raises:
        UsageError: it is no flag's, or no text, number or list of these.
    """
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{file}: {key}: expected true or false, found {value!r}")
        return value
    several = option.multiple or option.nargs > 1
    items = value if several and isinstance(value, list) else [value]
    if any(isinstance(item, bool | list | dict) for item in items) or (several and items is not value):
        expected = "a list of texts or numbers" if several else "a text or a number"
        raise UsageError(f"{file}: {key}: expected {expected}, found {value!r}")
    texts = [path_beside(file, str(item)) if _names_file(option, item) else str(item) for item in items]
    return texts if several else texts[0]


def _names_file(option: click.Option, value: Any) -> bool:
    """Whether a value is a path: by the option's type, or by what its help calls it."""
    is_file = isinstance(option.type, click.Path) or (option.metavar or "").startswith("FILE")
    return is_file and value != RANDOM
