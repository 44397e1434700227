"""What a process has left of a folder that it was putting into its place: settled by the next writer or reader.

In: an output, and the hidden folder that belongs to it, which may have come along with a folder from elsewhere. Out:
the whole new folder, or the old one. Never: removes or replaces anything outside of the output.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from pydantic import TypeAdapter

from tc_deploy.bundle.documents import is_inside
from tc_deploy.bundle.kinds import FolderKind, NotOursError, is_plain, remove_written, written_names
from tc_deploy.bundle.storage import sync
from tc_deploy.errors import StorageError

NEW, OLD, READY, STALE = "new", "old", "ready", "stale.json"
"""In the hidden folder: what is being made, what is being replaced, what is to be moved in, and what goes for it."""


def settle(destination: Path, holder: Path, kind: FolderKind) -> None:
    """Decide between a folder and what it replaces: a whole new one wins, otherwise the old one comes back."""
    old = holder / OLD
    if old.is_dir() and not old.is_symlink():
        if (destination / kind.marker).is_file():
            remove_written(old, kind)
            if old.is_dir():
                _move_what_is_left(old, destination, kind)
        elif not destination.exists() or not any(destination.iterdir()):
            old.rename(destination)
    shutil.rmtree(holder / NEW, ignore_errors=True)


def _move_what_is_left(old: Path, destination: Path, kind: FolderKind) -> None:
    """Keep what somebody else put into a folder after it was looked at: it goes where it would have stood."""
    with contextlib.suppress(NotOursError):
        written_names(old, kind)
        return  # a file of ours could not be removed; the next writer tries again
    for path in sorted(old.rglob("*"), reverse=True):
        place = destination / path.relative_to(old)
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif is_plain(destination, str(path.relative_to(old))) and not (place.exists() or place.is_symlink()):
                place.parent.mkdir(parents=True, exist_ok=True)
                path.rename(place)
    with contextlib.suppress(OSError):
        old.rmdir()


def move_in(destination: Path, holder: Path, kind: FolderKind) -> None:
    """Put a folder that is ready in the place of the one that its hidden folder lies in, from wherever it stands.

    Raises:
        StorageError: what is ready, or was to go, would be moved or removed elsewhere; nothing is touched.
    """
    ready = holder / READY
    if not ready.is_dir():
        (holder / STALE).unlink(missing_ok=True)
        shutil.rmtree(holder / NEW, ignore_errors=True)
        return
    if (ready / kind.marker).is_file():
        stale = _checked_stale(destination, holder)
        (destination / kind.marker).unlink(missing_ok=True)
        sync(destination)
        for name in stale:
            with contextlib.suppress(OSError):
                (destination / name).unlink()
        for parent in sorted({(destination / name).parent for name in stale}, reverse=True):
            with contextlib.suppress(OSError):
                if parent != destination:
                    parent.rmdir()
        for path in sorted(ready.rglob("*")):
            place = destination / path.relative_to(ready)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            elif path != ready / kind.marker:
                path.replace(place)
        for folder in [path for path in ready.rglob("*") if path.is_dir()]:
            sync(destination / folder.relative_to(ready))
        sync(destination)
        (ready / kind.marker).replace(destination / kind.marker)
        sync(destination)
    shutil.rmtree(ready, ignore_errors=True)
    (holder / STALE).unlink(missing_ok=True)


def _checked_stale(destination: Path, holder: Path) -> list[str]:
    """The names that are to go before what is ready moves in; the hidden folder may have come along with a folder.

    Raises:
        StorageError: a name, or a link on the way to one, leads out of the folder.
    """
    ready = holder / READY
    try:
        stale = TypeAdapter(list[str]).validate_json((holder / STALE).read_bytes(), strict=True)
        coming = list(ready.rglob("*"))
        names = [*stale, *(path.relative_to(ready).as_posix() for path in coming)]
        is_sound = (
            all(is_inside(name) and is_plain(destination, name) for name in names)
            and not any(path.is_symlink() for path in (ready, *coming))
            and not any((destination / path.relative_to(ready)).is_symlink() for path in coming if path.is_dir())
        )
    except (OSError, ValueError):
        is_sound, stale = False, []
    if not is_sound:
        raise StorageError(f"{holder} is in the way: tc-deploy did not make what is in it; move it away")
    return stale
