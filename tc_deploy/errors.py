"""The errors that a user can meet, each with its exit code.

    TcDeployError                 1
    ├── UsageError                2   an option or argument is out of range or does not fit the others
    ├── ModelError                3   a checkpoint is missing, half-written, of an unknown class or in a pickle format;
    │                                 or a classifier does not judge the model's pictures
    ├── PlanError                 4   a plan is malformed, or made for another model, step count or size
    ├── BundleError               5   an artefact folder is missing, incomplete or altered
    ├── ExportError               6   a graph or a scheduler cannot be exported, or the graph departs from PyTorch
    ├── BackendError              7   an engine cannot be built or loaded here; names the extra to install
    ├── StorageError              8   an output cannot be written, or would replace what is not this tool's
    ├── NotFiniteError            9   a run, a training or a table came to NaN or infinity, or a weight is one
    ├── OutOfMemoryError         10   the machine's memory does not suffice for what was asked
    └── Cancelled               130   the caller stopped a run between two steps

Any other exception that reaches the command line is a defect of ours, and ends with ``INTERNAL_EXIT_CODE``, 70. A
signal ends the command line with 128 + its number: 129 SIGHUP, 130 SIGINT, 143 SIGTERM; and whoever stops reading its
output ends it with 141, silently, as SIGPIPE would.

A message says what is wrong, where, what was expected and found, and how to mend it, in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or cannot show: control characters, marks that turn text around, halves of surrogates."""
INTERNAL_EXIT_CODE: Final = 70
"""Of a defect of ours; sysexits.h calls it EX_SOFTWARE."""
READER_LEFT_EXIT_CODE: Final = 141
"""Nobody reads the output any more; a shell reports a program so that SIGPIPE ended."""


class TcDeployError(Exception):
    """Base of every error that is the user's to mend; its text is shown without a traceback."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """The message as one line, whatever a file's name or a library's error brought into it."""
        return printable(re.sub(r"\s*\n\s*", " ", super().__str__()))


class UsageError(TcDeployError):
    """An option or argument is out of range, or does not fit the others."""

    exit_code = 2


class ModelError(TcDeployError):
    """A checkpoint is missing, half-written, of an unknown class or in a pickle format; or a classifier is unfit."""

    exit_code = 3


class PlanError(TcDeployError):
    """A plan is malformed, or was made for another model, step count or size."""

    exit_code = 4


class BundleError(TcDeployError):
    """An artefact folder is missing, incomplete, altered, or of another kind than the command needs."""

    exit_code = 5


class ExportError(TcDeployError):
    """A graph or scheduler cannot be exported, or an exported graph departs from PyTorch."""

    exit_code = 6


class BackendError(TcDeployError):
    """An engine cannot be built or loaded on this machine."""

    exit_code = 7


class StorageError(TcDeployError):
    """An output cannot be written, or would replace what this tool did not write."""

    exit_code = 8


class NotFiniteError(TcDeployError):
    """A run, a training or a table came to NaN or infinity, or a weight is one; the message names where it began."""

    exit_code = 9


class OutOfMemoryError(TcDeployError):
    """The machine's memory does not suffice for what was asked."""

    exit_code = 10


class Cancelled(TcDeployError):  # noqa: N818 - an outcome that the caller asked for, not a failure
    """The caller stopped a run between two steps; the pipeline stays usable."""

    exit_code = 130


def printable(text: str) -> str:
    """A text with what a terminal would obey or hide written out, so that it is read and not acted on."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def causes(error: BaseException, *, contexts: bool = True) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; each once, for causes may form a circle.

    Args:
        error: the error.
        contexts: where nothing was named as the cause, go on with what was being handled.
    """
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (following.__context__ if contexts else None)


def counted(count: int, noun: str) -> str:
    """``1 picture``, ``8 pictures``: a number in a message."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def no_file(path: Path) -> str:
    """What is wrong with a path that is to be a file, in words; to open a pipe, say, would be to wait without end."""
    kinds = ((Path.is_dir, "a folder"), (Path.is_fifo, "a pipe"), (Path.is_socket, "a socket"))
    there = next((name for is_kind, name in kinds if is_kind(path)), "a device" if path.exists() else None)
    return "no such file" if there is None else f"{there}, and no file"


def first_line(error: BaseException | str) -> str:
    """What a library's error says first, for our own one-line message; its class where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return printable(" ".join(line.split()))
