"""Single files as outputs: what a file would replace is looked at before the work whose result it is to hold.

In: a path as a user gave it. Out: a file that is written at once, in the place of none but one of ours; a device node,
a pipe and what a descriptor leads to are written through, a link's target is replaced and not the link. Never: touches
an input of the same command, or somebody's file unasked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tc_deploy.bundle import locks
from tc_deploy.bundle.apart import check_apart
from tc_deploy.bundle.kinds import HOLDER_SUFFIX, left_overs
from tc_deploy.bundle.storage import like, made_folder, storage_errors
from tc_deploy.errors import StorageError

_MOST_LINKS = 40
"""As many as the system follows."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file that a command writes."""

    name: str
    """What a user calls it, with its article: ``a report``."""
    is_ours: Callable[[Path], bool] | None
    """Whether a file, by its content, is one that this tool wrote; None where the format cannot say."""


def check_output(path: Path, kind: FileKind, *, reads: Iterable[Path] = (), force: bool = False) -> None:
    """Check that a file can be written, and that nobody loses anything by it; leaves the place as it was.

    Args:
        path: the output.
        kind: what it is to be; a file of that kind may be replaced, and an empty one.
        reads: files and folders that the same command reads.
        force: replace any other file too.

    Raises:
        StorageError: it may not be written; says why.
    """
    with storage_errors(path):
        if _is_stream(path):
            return
        real = Path(os.path.realpath(path))
        check_apart(path, real, reads)
        with made_folder(real.parent):
            temporary = _temporary(real)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            temporary.unlink()
        if real.exists() and real.stat().st_size and not force and not (kind.is_ours and kind.is_ours(real)):
            whose = (
                f"is not {kind.name} that tc-deploy wrote" if kind.is_ours else f"{kind.name} cannot say who wrote it"
            )
            raise StorageError(f"{path} exists and {whose}; choose another output, or replace it with --force")


def write_output(path: Path, data: bytes) -> None:
    """Write a checked output.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(path):
        if _is_stream(path):
            own = _own_descriptor(path)
            with path.open("wb") if own is None else open(os.dup(own), "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(data)
            return
    write_bytes(Path(os.path.realpath(path)), data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file at once (temporary file, flush, rename); of one that is there, mode and owner are kept.

    What killed processes left of the same file is removed.

    Raises:
        StorageError: the place cannot be written.
    """
    with storage_errors(path), made_folder(path.parent):
        for left in left_overs(path):
            _remove_if_dead(left)
        temporary = _temporary(path)
        descriptor: int | None = None
        try:
            # Locked while it is written, so that another process sees that its writer lives.
            descriptor = locks.acquire(temporary)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            with contextlib.suppress(FileNotFoundError):
                like(temporary, path.stat())
            try:
                temporary.replace(path)
            except OSError as error:
                # A file that is itself a mount point can be written, and not replaced.
                if error.errno not in (errno.EBUSY, errno.EXDEV):
                    raise
                path.write_bytes(data)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if descriptor is not None:
                os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{HOLDER_SUFFIX}-{secrets.randbits(32)}")


def _remove_if_dead(left: Path) -> None:
    with contextlib.suppress(OSError):
        if left.is_file() and not left.is_symlink():
            locks.release(locks.acquire(left), left)


# ----------------------------------------------------------------------------------------------- what the output is


def _is_stream(path: Path) -> bool:
    """Whether an output is written through and not replaced.

    Raises:
        StorageError: it is a folder, a disk or a socket.
        OSError: it cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    for is_kind, name in ((stat.S_ISDIR, "a folder"), (stat.S_ISBLK, "a disk"), (stat.S_ISSOCK, "a socket")):
        if is_kind(mode) and (name != "a socket" or _own_descriptor(path) is None):
            raise StorageError(f"{path} cannot be written: it is {name}; choose another output")
    return not stat.S_ISREG(mode) or _own_descriptor(path) is not None


def _own_descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path leads to, as ``/dev/stdout`` does; None where it is a file."""
    place = os.path.abspath(path)  # noqa: PTH100 - a link is looked at before it is followed
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(place)
        folder = os.path.realpath(folder)
        if folder == f"/proc/{os.getpid()}/fd":
            return int(name) if name.isdigit() else None
        place = os.path.join(folder, name)  # noqa: PTH118
        if not os.path.islink(place):  # noqa: PTH114
            return None
        place = os.path.join(folder, os.readlink(place))  # noqa: PTH115, PTH118
    return None
