"""Readers of a folder, and the writer who waits until there are none.

In: a folder, by its marker. Out: the folder as it is for as long as a block runs. Never: changes one, but for putting
right what a writer left that died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tc_deploy.bundle import locks
from tc_deploy.bundle.holders import hidden_beside, hidden_inside, leave, locked
from tc_deploy.bundle.kinds import FolderKind
from tc_deploy.bundle.settle import OLD, READY, move_in, settle
from tc_deploy.errors import StorageError

_POLL_S = 0.02
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(folder: Path, marker: str) -> Iterator[None]:
    """Wait until nobody reads a folder, and keep readers away."""
    file, told = folder / marker, False
    if not file.is_file():
        yield
        return
    while True:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if locks.try_lock(descriptor, file, shared=False):
                break
        except BlockingIOError:
            if not told:
                _LOG.info("waiting until no other process reads %s", folder)
                told = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Keep a folder as it is for as long as the block reads it; a writer waits with putting another in its place.

    Where nothing can be locked, on a read-only place as elsewhere, or nothing is there, the block runs all the same.
    """
    descriptor = _shared(folder, kind)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _shared(folder: Path, kind: FolderKind) -> int | None:
    file = folder / kind.marker
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if locks.try_lock(descriptor, file, shared=True):
                return descriptor
        except BlockingIOError:
            time.sleep(_POLL_S)
        except FileNotFoundError:
            if not _is_settled(folder, kind):
                return None
        except OSError:
            return None


def _is_settled(folder: Path, kind: FolderKind) -> bool:
    """Whether it is worth looking again for a folder that is not there: one is being replaced, or was half replaced."""
    real = Path(os.path.realpath(folder))
    ways: tuple[tuple[Path, str, Callable[[Path, Path, FolderKind], None]], ...] = (
        (hidden_beside(real) if real.name else real, OLD, settle),
        (hidden_inside(real), READY, move_in),
    )
    for holder, part, put_right in ways:
        if not (holder / part).is_dir():
            continue
        try:
            descriptor = locked(holder, shared=False)
        except BlockingIOError:
            time.sleep(_POLL_S)
            return True
        except (OSError, StorageError):
            return False  # to be settled by somebody else, if by anybody
        try:
            put_right(real, holder, kind)
        except (OSError, StorageError):
            return False
        finally:
            leave(holder, descriptor)
        return (real / kind.marker).is_file()
    return False
