"""The hidden folder beside an output, or inside one that stays: the lock of its writers, and what is not finished.

In: an output's path. Out: its hidden folder, held for as long as a block runs. Never: touches one that is somebody's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tc_deploy import __version__
from tc_deploy.bundle import locks
from tc_deploy.bundle.documents import Document, canonical_json
from tc_deploy.bundle.kinds import (
    HOLDER_SUFFIX,
    NotOursError,
    known_document,
)
from tc_deploy.errors import StorageError

OWNER = "owner.json"
LOCK = "lock"


class OwnerRecord(Document):
    """What tells a hidden folder of ours from somebody's."""

    kind: Literal["holder"]
    format_version: Literal[1]
    made_by: str


def hidden_beside(destination: Path) -> Path:
    """Where what belongs to an output lies while it is written.

    Raises:
        StorageError: the output has no name of its own.
    """
    if not destination.name:
        raise StorageError(f"{destination} cannot be an output; name a folder in it")
    return destination.with_name(f".{destination.name}{HOLDER_SUFFIX}")


def hidden_inside(destination: Path) -> Path:
    """The same for an output that keeps its place."""
    return destination / HOLDER_SUFFIX


@contextlib.contextmanager
def held(holder: Path, destination: Path) -> Iterator[None]:
    """Hold an output's lock; the hidden folder goes again when nothing is left in it."""
    descriptor = acquired(holder, destination, shared=False)
    try:
        if not (holder / OWNER).exists():
            record = OwnerRecord(kind="holder", format_version=1, made_by=f"tc-deploy {__version__}")
            (holder / OWNER).write_text(canonical_json(record.model_dump(mode="json")), encoding="utf-8")
        yield
    finally:
        leave(holder, descriptor)


def acquired(holder: Path, destination: Path, *, shared: bool) -> int:
    """Lock a hidden folder; returns the descriptor that holds it.

    Raises:
        StorageError: another process is writing the output, or the folder is somebody's.
    """
    try:
        return locked(holder, shared=shared)
    except BlockingIOError:
        raise StorageError(f"another process is writing {destination}; wait for it to end") from None


def locked(holder: Path, *, shared: bool) -> int:
    """Lock a hidden folder, which is made if it is not there.

    Raises:
        BlockingIOError: another process holds it.
        StorageError: it is somebody's.
    """
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                holder.mkdir()
            _check_is_holder(holder)
            return locks.acquire(holder / LOCK, shared=shared)
        except FileNotFoundError:
            if not holder.parent.is_dir():
                raise
            # Another process has left, and taken the folder along.
        except BaseException:  # a full disk, or Ctrl-C
            with contextlib.suppress(OSError):
                holder.rmdir()  # which is refused where anything is in it
            raise


def _check_is_holder(holder: Path) -> None:
    """Check that a hidden folder is ours: by its record, or because there is nothing in it yet.

    Raises:
        StorageError: it is somebody's.
        FileNotFoundError: it has gone.
    """
    try:
        if holder.is_symlink():
            raise NotOursError("it is a link")
        known_document(holder / OWNER, "holder", OwnerRecord, {})
    except NotOursError:
        if not os.path.lexists(holder):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(holder)) from None
        if holder.is_symlink() or not holder.is_dir() or not _is_bare(holder):
            raise StorageError(
                f"{holder} is in the way: tc-deploy keeps there what it has not finished; move it away"
            ) from None


def _is_bare(holder: Path) -> bool:
    return all(path.name in (LOCK, OWNER) and not path.is_symlink() for path in holder.iterdir())


def leave(holder: Path, descriptor: int) -> None:
    """Let go of a hidden folder, which goes where nothing is left in it."""
    with contextlib.suppress(OSError):
        if _is_bare(holder):
            (holder / OWNER).unlink(missing_ok=True)
    locks.release(descriptor, holder / LOCK)
    with contextlib.suppress(OSError):
        holder.rmdir()
