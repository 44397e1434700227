"""Outputs lie apart from inputs, and from what is already made.

In: where an output is to lie, and what the same command reads. Out: nothing, or why it may not lie there. A folder of
ours is checked file by file and replaced as a whole, and a checkpoint is somebody's: neither is a place for more.
Never: changes anything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from tc_deploy.bundle.documents import LARGEST_DOCUMENT_BYTES, MANIFEST, PLAN_DOCUMENT
from tc_deploy.bundle.kinds import HOLDER_SUFFIX
from tc_deploy.errors import StorageError

_OURS = {PLAN_DOCUMENT: "plan", MANIFEST: "bundle"}
"""Documents by which a folder is ours, with what stands under ``kind``."""


def check_apart(output: Path, real: Path, reads: Iterable[Path] = (), *, is_inner: bool = False) -> None:
    """Check that an output is no input, and lies neither in a folder of inputs nor in one of ours.

    Args:
        output: as a user called it.
        real: the same with links resolved.
        reads: files and folders that the same command reads.
        is_inner: it belongs into the folder that it lies in.

    Raises:
        StorageError: it does; names what it is or lies in.
    """
    for place in reads:
        _check_apart_from(output, real, place)
    for parent in list(real.parents)[1 if is_inner else 0 :]:
        if parent.name.endswith(HOLDER_SUFFIX):
            return  # where we keep what is not finished
        if kind := _kind_of(parent):
            raise StorageError(f"{output} lies in {parent}, which is a {kind} of tc-deploy's; choose another output")


def _check_apart_from(output: Path, real: Path, place: Path) -> None:
    files, folders = _identities(place)
    above = {_identity(parent) for parent in real.parents if parent.exists()}
    if (real.exists() and _identity(real) in files) or above & folders:
        what = "is" if not place.is_dir() else "lies in"
        raise StorageError(f"{output} {what} {place}, which this command reads; choose another output")


def _kind_of(folder: Path) -> str | None:
    """What a folder of ours is, by a look at its document; None where it is none."""
    for name, kind in _OURS.items():
        path = folder / name
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if path.is_file() and path.stat().st_size <= LARGEST_DOCUMENT_BYTES:
                found = json.loads(path.read_bytes())
                if isinstance(found, dict) and found.get("kind") == kind and "format_version" in found:
                    return "bundle" if (folder / MANIFEST).is_file() else kind
    return None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _identities(place: Path) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """All files and all folders of an input, links followed."""
    files: set[tuple[int, int]] = set()
    folders: set[tuple[int, int]] = set()
    waiting = [place]
    while waiting:
        path = waiting.pop()
        with contextlib.suppress(OSError):
            found = _identity(path)
            if not path.is_dir():
                files.add(found)
            elif found not in folders:
                folders.add(found)
                waiting += path.iterdir()
    return files, folders
