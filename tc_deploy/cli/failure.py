"""From any exception to one line on stderr and an exit code.

What is not one of ours is a defect of ours, but for what the machine did: its memory or its disk ran out, a library
does not load, somebody pressed Ctrl-C. A defect's traceback is shown with ``-v``.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import NamedTuple

import click

from tc_deploy.cli import PROGRAM
from tc_deploy.errors import (
    INTERNAL_EXIT_CODE,
    READER_LEFT_EXIT_CODE,
    BackendError,
    Cancelled,
    OutOfMemoryError,
    StorageError,
    TcDeployError,
    UsageError,
    causes,
    first_line,
    printable,
)

_OUT_OF_MEMORY = (
    "bad_alloc",
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "could not create a primitive",  # oneDNN, when it gets no memory for a kernel
    "failed to map segment",  # the loader of libraries
    *("without exception set", "without setting an exception"),  # Python, when it gets no memory for a MemoryError
)
"""How libraries that know no MemoryError say it, in lower case."""
_MACHINE_S = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE),
        *(errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""Error numbers of what a place or its owner refuses, whichever line of code asks."""
_LONGEST_WORDS = 2000
"""Of a message, so that a large argument is not printed in full."""


class ReaderLeft(Exception):  # noqa: N818 - an outcome, as Cancelled
    """Whoever read the output has closed it; not an OSError, of which libraries make something else."""


class Failure(NamedTuple):
    """What is shown and returned."""

    message: str
    """Empty: nothing is shown."""
    exit_code: int
    is_defect: bool = False


def show_failure(error: BaseException) -> int:
    """Show an error in one line.

    Returns:
        Its exit code.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    failure = failure_of(error)
    log = logging.getLogger("tc_deploy") if failure.is_defect else logging.getLogger()
    log.debug("The error came from here:", exc_info=error)
    if failure.message:
        click.echo(f"error: {one_line(failure.message)}", err=True)
    return failure.exit_code


def failure_of(error: BaseException) -> Failure:
    """What an error means for the user."""
    try:
        return _explained(error)
    except Exception as short:  # noqa: BLE001 - the explanation may not take the place of what it explains
        # What ran out for the command may be out for its explanation too, which looks for what is installed.
        kind = StorageError if _shortage(short) is None else OutOfMemoryError
        return Failure(f"{first_line(error)}; and to explain it: {first_line(short)}", kind.exit_code)


def _explained(error: BaseException) -> Failure:
    if (words := _interruption(error)) is not None:
        return Failure(words, Cancelled.exit_code)
    if isinstance(error, TcDeployError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else PROGRAM
        return Failure(f"{error.format_message()} (see: {command} --help)", UsageError.exit_code)
    if isinstance(error, click.ClickException):
        return Failure(error.format_message(), UsageError.exit_code)
    if isinstance(error, ReaderLeft | BrokenPipeError):
        return Failure("", READER_LEFT_EXIT_CODE)
    if (shortage := _shortage(error)) is not None:
        what = first_line(shortage)
        return Failure(
            f"the machine's memory does not suffice: {what}; a smaller batch, picture or model takes less",
            OutOfMemoryError.exit_code,
        )
    from tc_deploy.libraries import load_failure  # not before: what memory ran out for is said without an import

    if (words := load_failure(error)) is not None:
        return Failure(words, BackendError.exit_code)
    if isinstance(error, OSError) and error.errno in _MACHINE_S:
        where = f"{error.filename}: " if error.filename else ""
        return Failure(f"{where}{error.strerror}", StorageError.exit_code)
    if isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error):  # PyTorch's, of a file it opens
        return Failure(first_line(error), StorageError.exit_code)
    words = f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
    return Failure(
        f"internal error: {words}; please report it with the output of {PROGRAM} -v and the same words",
        INTERNAL_EXIT_CODE,
        is_defect=True,
    )


def _interruption(error: BaseException) -> str | None:
    """What ended the run, where an error is what a library made of KeyboardInterrupt, or came up on its way out."""
    if isinstance(error, Cancelled):
        return None
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            return str(cause) or "interrupted"
        if isinstance(cause, click.Abort) or KeyboardInterrupt.__name__ in str(cause):
            return "interrupted"
    return None


def _shortage(error: BaseException) -> BaseException | None:
    """What of an error's causes says that memory ran out; the first one, for what is made of it says less."""
    found: BaseException | None = None
    for cause in causes(error, contexts=False):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            found = cause
        if isinstance(cause, RuntimeError | ImportError | SystemError) and any(
            sign in str(cause).lower() for sign in _OUT_OF_MEMORY
        ):
            found = cause
    return found


def one_line(message: str) -> str:
    """A message without line breaks and without characters that would do something to a terminal."""
    words = " ".join(line.strip() for line in message.splitlines())
    if len(words) > _LONGEST_WORDS:
        half = _LONGEST_WORDS // 2
        words = f"{words[:half]} [...] {words[-half:]}"
    return printable(words)
