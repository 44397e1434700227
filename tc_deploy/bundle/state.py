"""The state of work that may be stopped and gone on with: one folder per command and settings, inside a claim's.

A list beside its record names every file before it is written, so that what is removed at the end is what was written.
Never: removes another command's state, or a file that is not on the list.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tc_deploy import __version__
from tc_deploy.bundle.documents import Document, canonical_json
from tc_deploy.bundle.folders import Claim
from tc_deploy.bundle.kinds import NotOursError, known_document, left_overs, remove_names
from tc_deploy.bundle.outputs import write_bytes
from tc_deploy.bundle.storage import storage_errors
from tc_deploy.errors import StorageError

RECORD = "state.json"
LIST = "state.files"
"""A name in JSON on each line. It only grows, so that the thousandth file costs no more than the first; an end that a
dead process tore off is no name, and the next line begins anew."""


class StateRecord(Document):
    """What tells a state folder of ours."""

    kind: Literal["state"]
    format_version: Literal[1]
    made_by: str
    files: tuple[str, ...] = ()
    """As earlier versions named them."""


def state_folder(claim: Claim, command: str, key: str) -> Path:
    """The folder for a command's state under some settings; what was written there before is still there.

    Args:
        claim: the output that the work is for.
        command: whose.
        key: stands for all that the state depends on.

    Raises:
        StorageError: it cannot be made, or somebody else's folder is in its place.
    """
    folder = claim.holder / f"{command}-{key}"
    if not (folder / RECORD).exists():
        # A process may have died while it wrote the very first record.
        if folder.exists() and set(folder.iterdir()) - set(left_overs(folder / RECORD)):
            raise StorageError(f"{folder} is in the way: it holds no {RECORD}; move it away")
        record = StateRecord(kind="state", format_version=1, made_by=f"tc-deploy {__version__}")
        write_bytes(folder / RECORD, canonical_json(record.model_dump(mode="json")).encode("utf-8"))
    _files(folder)
    return folder


def write_state(path: Path, data: bytes) -> None:
    """Write a file at once, and note it on the list of the state folder that it lies in, if it lies in one.

    Raises:
        StorageError: it cannot be written.
    """
    for folder in path.parents:
        if (folder / RECORD).is_file():
            if not path.exists():  # else it is on the list
                _note(folder, path.relative_to(folder).as_posix())
            break
    write_bytes(path, data)


def clear_state(folder: Path) -> None:
    """Remove a state folder, less what is not on its list."""
    with contextlib.suppress(StorageError):
        remove_names(folder, [*_files(folder), LIST, RECORD])
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> list[str]:
    try:
        found: dict[str, Any] = known_document(folder / RECORD, "state", StateRecord, {})
    except NotOursError as error:
        raise StorageError(
            f"{folder} is in the way: {RECORD} in it is none of tc-deploy: {error}; move it away"
        ) from None
    names = [*found.get("files", ()), *_noted(folder)]
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


def _noted(folder: Path) -> Iterator[str]:
    """The names on a state folder's list."""
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / LIST).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                name = json.loads(line)
                if isinstance(name, str):
                    yield name


def _note(folder: Path, name: str) -> None:
    with storage_errors(folder / LIST), (folder / LIST).open("ab") as file:
        file.write(b"\n" + json.dumps(name).encode())
        file.flush()
        os.fsync(file.fileno())
