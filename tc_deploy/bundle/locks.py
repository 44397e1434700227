"""Locks on files, which the system gives back when a process dies.

``flock`` is used as it is: filelock's lock for readers and writers is an SQLite database, which leaves files behind and
wants to write where a reader may not. Never: waits, or leaves a lock file behind but for a process that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF})
"""A file system without locks, or (NFS) with none for a file that is open to read: there one goes without."""


def acquire(file: Path, *, shared: bool = False) -> int:
    """Lock a file, which is made if it is not there.

    Returns:
        A descriptor for :func:`release`.

    Raises:
        BlockingIOError: another process or thread holds it.
        OSError: it cannot be opened.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if try_lock(descriptor, file, shared=shared):
            return descriptor


def try_lock(descriptor: int, file: Path, *, shared: bool) -> bool:
    """Lock an open file.

    Returns:
        Whether it is still the one of that name; where not, it is closed.

    Raises:
        BlockingIOError: another holds it; it is closed.
    """
    try:
        with _without_locks():
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return True
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return False


def release(descriptor: int, file: Path) -> None:
    """Give a lock back.

    Its file goes with the last that holds it, and while that one holds it: who opened it before sees then that it has
    lost its name.
    """
    try:
        with contextlib.suppress(OSError), _without_locks():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                file.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _without_locks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
