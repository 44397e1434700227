"""What is common to all writing: errors of the disk as one line, folders that are made on the way, flushes to disk.

In: paths, and what the system said of them. Out: :class:`StorageError`. Never: removes what it did not make.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tc_deploy.errors import StorageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""They say that data do not fit, whatever was being written."""
_UNWRITABLE = _FULL | frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EBUSY, errno.EXDEV, errno.ETXTBSY, errno.ESTALE}
    | {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
    | {errno.EMFILE, errno.ENFILE, errno.EMLINK, errno.ENODEV, errno.ENXIO, errno.EPIPE}
)
_ENDS_IN_ERRNO = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) pass on what the system said."""


@contextlib.contextmanager
def storage_errors(output: Path, *places: Path) -> Iterator[None]:
    """Turn what the system says of a write into one line.

    Args:
        output: what a user called it.
        places: where the block writes, where it does more than write: of an error of the system's it is told by the
            file that it names, and one that names none or another is passed on.

    Raises:
        StorageError: the block could not write.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error, places):
            raise
        raise StorageError(f"{output} cannot be written: {_reason(error, output)}") from None


def _is_of_writing(error: Exception, places: tuple[Path, ...]) -> bool:
    code = _errno_of(error)
    if code in _FULL:
        return True
    if code not in _UNWRITABLE:
        return False
    if not places or not isinstance(error, OSError):
        return True
    return isinstance(error.filename, str) and any(Path(error.filename).is_relative_to(place) for place in places)


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, StorageError):
        return None
    found = _ENDS_IN_ERRNO.search(str(error))
    if found is not None:
        return int(found.group(1))
    return errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else None


def _reason(error: Exception, path: Path) -> str:
    """Why a path cannot be written; the system only says "File exists" where a file stands in a folder's place."""
    with contextlib.suppress(OSError):
        for place in path.absolute().parents:
            if place.exists() and not place.is_dir():
                return f"{place} is a file, not a folder"
    words = os.strerror(_errno_of(error) or errno.EIO)
    name = getattr(error, "filename", None)
    return f"{words} ({name})" if name else words


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """A folder with all above it for as long as the block runs; what was made for it and stayed empty goes again.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    for place in (folder, *folder.parents):
        if place.exists():
            break
        missing.append(place)
    made: list[Path] = []
    try:
        for place in reversed(missing):
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                made.append(place)
        # A file in its place is found here, and so is a link that leads nowhere.
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        yield
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):
                place.rmdir()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def like(path: Path, before: os.stat_result) -> None:
    """Give what takes another's place its mode, and its owner as far as that is allowed."""
    status = path.stat()
    if (status.st_uid, status.st_gid) != (before.st_uid, before.st_gid):
        with contextlib.suppress(OSError):
            os.chown(path, before.st_uid, before.st_gid)
    path.chmod(before.st_mode & 0o7777)
