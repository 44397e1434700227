"""Whose a folder is: told by what its marker says, never by a file's name.

In: a folder, and the kind that it is to be. Out: the names of what this tool wrote into it, or why it is not of that
kind. Never: follows a link, reads a document of any size, or changes anything but by :func:`remove_written`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from tc_deploy.bundle.documents import LARGEST_DOCUMENT_BYTES, Document, FileRecord, first_problem, is_inside
from tc_deploy.errors import StorageError

MADE_BY: Final = "tc-deploy "
"""What every document's ``made_by`` begins with."""
HOLDER_SUFFIX: Final = ".tc-deploy"
"""Of the hidden folder beside an output, ``.NAME.tc-deploy``; inside one that stays where it is, ``.tc-deploy``."""
_TEMPORARY = re.compile(rf"\.(?P<name>.+)\{HOLDER_SUFFIX}-\d+")
_VOLUME_OWN = frozenset({"lost+found"})
"""What a file system has at its root, whoever uses it."""
_RECORDS = TypeAdapter(dict[str, FileRecord])


class NotOursError(Exception):
    """A folder or document is not of the kind that was asked for; the text says what was found."""


@dataclass(frozen=True, kw_only=True)
class FolderKind:
    """A kind of folder that this tool makes and replaces."""

    name: str
    """What a user calls it, with its article: ``a bundle``."""
    marker: str
    """The document that is written last and names the rest."""
    names: Callable[[Path], Iterable[str]]
    """What the tool wrote into such a folder, by path inside it, as far as its documents tell; of what lies in a folder
    of its own the document last. Raises :class:`NotOursError`."""
    inner: FolderKind | None = None
    """The kind of the folders that other commands make inside."""
    is_inner: bool = False
    """Such folders are made inside one of another kind."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The keys of a document of an older format version, whose class is gone."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()


def known_document(
    path: Path, kind: str, document: type[Document] | None, earlier: Mapping[int, Earlier]
) -> dict[str, Any]:
    """Read a document only to know whose it is.

    Args:
        path: the file.
        kind: what stands under ``kind``, where it has that key.
        document: its class; one of its format version is of that class in full. None where a room above has it.
        earlier: the keys of other versions.

    Raises:
        NotOursError: it is none, and says why.
    """
    text = _read(path)
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise NotOursError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise NotOursError("no JSON object")
    if found.get("kind", kind) != kind:
        raise NotOursError(f"its kind is {_short(found['kind'])}")
    if not str(found.get("made_by", MADE_BY)).startswith(MADE_BY):
        raise NotOursError("tc-deploy did not make it")
    version = found.get("format_version")
    current = () if document is None else get_args(document.model_fields["format_version"].annotation)
    if document is not None and type(version) is int and version in current:
        try:
            document.model_validate_json(text, strict=True)
        except ValidationError as error:
            where, reason = first_problem(error)
            raise NotOursError(f"{where}: {reason}" if where else reason) from None
    elif type(version) is int and version in earlier:
        keys = earlier[version]
        if not keys.required <= found.keys() <= keys.required | keys.optional:
            raise NotOursError(f"it has not the keys of format version {version}")
    else:
        raise NotOursError(f"its format version is {_short(version)}")
    return found


def file_names(records: Any) -> list[str]:
    """The names of a document's file records.

    Raises:
        NotOursError: they are none.
    """
    try:
        return list(_RECORDS.validate_python(records, strict=True))
    except ValidationError:
        raise NotOursError("its files are no file records") from None


def _read(path: Path) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise NotOursError("it is a link" if stat.S_ISLNK(status.st_mode) else "it is no file")
        if status.st_size > LARGEST_DOCUMENT_BYTES:
            raise NotOursError(f"{status.st_size} bytes are too many")
        return path.read_bytes()
    except OSError as error:
        raise NotOursError(error.strerror or str(error)) from None


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 40 else text[:37] + "..."


# ------------------------------------------------------------------------------------------------------ what is in it


def written_names(folder: Path, kind: FolderKind) -> list[str]:
    """What the tool wrote into a folder of a kind, as its documents tell.

    Raises:
        NotOursError: the folder is not of that kind.
    """
    names = list(dict.fromkeys(kind.names(folder)))
    for name in names:
        if not is_inside(name):
            raise NotOursError(f"it names {_short(name)}, which is outside of it")
    return names


def check_ours(folder: Path, kind: FolderKind) -> None:
    """Check that a folder may be replaced: it is not there, empty, or of that kind with nothing else in it.

    Raises:
        StorageError: it may not; names what is in the way.
    """
    cure = "move it away or choose another output"
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise StorageError(f"{folder} is no folder, so it is not replaced; {cure}")
        return
    found = next(foreign_names(folder, ()), None)
    if found is None:
        return
    marker = folder / kind.marker
    if not (marker.exists() or marker.is_symlink()):
        raise StorageError(
            f"{folder} exists and holds no {kind.marker}, so it is not {kind.name} that this command may replace: it"
            f" holds {_shown(found)}; {cure}"
        )
    try:
        names = written_names(folder, kind)
    except NotOursError as error:
        raise StorageError(
            f"{folder} is not {kind.name} that this command may replace: {kind.marker} is not one of tc-deploy's:"
            f" {error}; {cure}"
        ) from None
    found = next(foreign_names(folder, names), None)
    if found is not None:
        raise StorageError(f"{folder} holds {_shown(found)}, which tc-deploy did not write there; {cure}")


def _shown(name: str) -> str:
    return ascii(name)[1:-1]


def foreign_names(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """What lies in a folder and is no plain file of these names, nor a folder of theirs, in order.

    Raises:
        OSError: a folder in it cannot be read.
    """
    names = frozenset(names)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for path, entry in _walk(folder, ""):
        if entry.is_dir(follow_symlinks=False):
            if path not in folders and not any((folder / path).iterdir()):
                yield path + "/"
        elif not entry.is_file(follow_symlinks=False) or not (path in names or _is_left_over(path, names)):
            yield path


def _walk(folder: Path, inside: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All paths inside a folder; links are not followed, and our own hidden folders left out."""
    with os.scandir(folder / inside) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if entry.is_dir(follow_symlinks=False):
            if entry.name.endswith(HOLDER_SUFFIX) or (not inside and entry.name in _VOLUME_OWN):
                continue
            yield path, entry
            yield from _walk(folder, path)
        else:
            yield path, entry


def _is_left_over(path: str, names: frozenset[str]) -> bool:
    """Whether a file is what a killed process left of one that it was writing."""
    found = _TEMPORARY.fullmatch(PurePosixPath(path).name)
    return found is not None and str(PurePosixPath(path).with_name(found["name"])) in names


def remove_written(folder: Path, kind: FolderKind) -> None:
    """Remove what the tool wrote into a folder of that kind, and the folder if nothing else is in it.

    The marker goes last of all files, so that a removal that was interrupted can be gone on with.
    """
    try:
        names = written_names(folder, kind)
    except NotOursError:
        names = []
    remove_names(folder, names)


def remove_names(folder: Path, names: Iterable[str]) -> None:
    """Remove plain files by their paths inside a folder, and folders that they leave empty; what cannot be stays."""
    names = list(names)
    for name in names:
        if is_plain(folder, name):
            for path in (*left_overs(folder / name), folder / name):
                with contextlib.suppress(OSError):
                    path.unlink()
    parents = {str(parent) for name in names for parent in PurePosixPath(name).parents} | {"."}
    for parent in sorted(parents, key=len, reverse=True):
        with contextlib.suppress(OSError):
            (folder / parent if parent != "." else folder).rmdir()


def is_plain(folder: Path, name: str) -> bool:
    """Whether no folder on the way to a file is a link, which may lead anywhere."""
    return not any((folder / parent).is_symlink() for parent in PurePosixPath(name).parents if str(parent) != ".")


def left_overs(path: Path) -> list[Path]:
    """What killed processes left of a file."""
    return [
        other
        for other in path.parent.glob(f".*{HOLDER_SUFFIX}-*")
        if (found := _TEMPORARY.fullmatch(other.name)) is not None and found["name"] == path.name
    ]
