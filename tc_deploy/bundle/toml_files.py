"""TOML that a user wrote: values that JSON can hold too, and paths relative to the file.

In: a file. Out: its values as Python has them. Never: knows which keys there may be.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

from tc_deploy.bundle.paths import path_from_here, real_path
from tc_deploy.errors import UNPRINTABLE, UsageError, first_line, printable

MAX_TOML_BYTES = 2**18
_DEEP_KEY = re.compile(r"""(?:["'A-Za-z0-9_-]{1,64}\s{0,8}\.\s{0,8}){64}""")
"""A dotted key of so many parts; what tomllib takes for one grows with the square of them."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        UsageError: it is missing, too large or no TOML, or holds what JSON cannot.
    """
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_TOML_BYTES):
            raise UsageError(f"{path}: not a TOML file of at most {MAX_TOML_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        if _DEEP_KEY.search(text):
            raise UsageError(f"{path}: not a TOML file that can be a recipe: a key is nested too deeply")
        values = tomllib.loads(text)
        _check_values(values, str(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, TOML, and numbers of many digits
        raise UsageError(f"{path}: not a TOML file: {first_line(error)}") from None
    return values


def _check_values(value: Any, where: str) -> None:
    """Check that a recipe holds what JSON can: a plan keeps it.

    Raises:
        UsageError: it holds a date, NaN, infinity or control characters; the message names the key.
    """
    match value:
        case dict():
            for key, inner in value.items():
                _check_values(key, where)
                _check_values(inner, f"{where}: {key}" if ": " not in where else f"{where}.{key}")
        case list():
            for inner in value:
                _check_values(inner, where)
        case str() if UNPRINTABLE.search(value):
            raise UsageError(f"{where}: expected text without control characters, found {printable(value)!r}")
        case float() if not math.isfinite(value):
            raise UsageError(f"{where}: must be a finite number, found {value}")
        case str() | float() | bool() | int():
            pass
        case _:
            raise UsageError(f"{where}: expected text, a number, a list or a table, found {value}")


def path_beside(file: Path, text: str) -> str:
    """A path that a file has relative to itself, as short as it can be said from here.

    Raises:
        UsageError: no file can have that name.
    """
    try:
        place = real_path(file.parent / text)
        missing = not place.exists()
    except (OSError, ValueError) as error:  # too long, or a zero byte
        raise UsageError(f"{file}: {text!r} cannot be a path: {error}") from None
    if text.startswith(".") and missing:
        return str(place)  # Two names without the dot would read like a hub's id.
    return path_from_here(place)
