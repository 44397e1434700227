"""Documents: canonical JSON, checksums, and what a reader refuses.

In: a folder's JSON and the files that it names. Out: checked records. Never: follows a path out of its folder, or
writes anything.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeAlias, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from tc_deploy.bundle.paths import real_path
from tc_deploy.errors import UNPRINTABLE, BundleError, printable

MANIFEST = "manifest.json"
PLAN_DOCUMENT = "plan.json"
LONGEST_NAME: Final = 1000
"""Characters of a file's path in a manifest; systems allow about four times as many."""
LARGEST_DOCUMENT_BYTES: Final = 64 * 2**20
"""More than any plan, manifest or search needs; read whole, so it bounds memory."""


class Document(BaseModel):
    """Base of everything that is stored as JSON: frozen, unknown keys refused, numbers finite (JSON has no NaN)."""

    # "constants" lets canonical_json refuse what is not finite; pydantic would write null for it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")


DocumentT = TypeVar("DocumentT", bound=Document)


class FileRecord(Document):
    """One file of a folder."""

    size_bytes: int
    sha256: str


def is_inside(name: str) -> bool:
    """Whether a name, taken as a path inside a folder, stays there, and is written as every path is."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name


def _named_inside(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    for name in files:
        if len(name) > LONGEST_NAME or name == "." or not is_inside(name):
            raise ValueError(f"{name[:80]!r} names no file inside the folder")
    return files


Files: TypeAlias = Annotated[dict[str, FileRecord], AfterValidator(_named_inside)]
"""Files of a folder by their path inside it. A name that leads elsewhere is refused with its document, whether anything
reads the file or not."""


def canonical_json(value: Any) -> str:
    """The one way in which a value is written: sorted keys, two spaces, a final newline.

    Raises:
        ValueError: a number is not finite; JSON has no NaN.
    """
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_records(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of files in ``folder``, by their path inside it."""
    return {
        name: FileRecord(size_bytes=(folder / name).stat().st_size, sha256=sha256_of_file(folder / name))
        for name in names
    }


def check_files(folder: Path, records: dict[str, FileRecord]) -> None:
    """Compare the files of ``folder`` with what its manifest says of them.

    Raises:
        BundleError: a name leads out of the folder, or a file is missing, of another size, or altered.
    """
    for name, record in records.items():
        path = folder / name
        try:
            _check_file(folder, path, name, record)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a symlink loop, before Python 3.13
            raise BundleError(f"{folder}: {name!r} cannot be read: {error}; make the folder again") from None


def _check_file(folder: Path, path: Path, name: str, record: FileRecord) -> None:
    if not real_path(path).is_relative_to(real_path(folder)):
        raise BundleError(f"{folder}: the file {name!r} lies outside the folder; do not use it, make the folder again")
    if not path.is_file():
        raise BundleError(f"{folder}: {name} is missing; make the folder again")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise BundleError(
            f"{path}: expected {record.size_bytes} bytes, found {size}; the file is truncated or altered,"
            " make the folder again"
        )
    found = sha256_of_file(path)
    if found != record.sha256:
        raise BundleError(
            f"{path}: expected SHA-256 {record.sha256[:12]}…, found {found[:12]}…; the file was altered,"
            " make the folder again"
        )


def read_document(kind: type[DocumentT], path: Path, what: str, maker: str) -> DocumentT:
    """Read a JSON document.

    Args:
        kind: the class to read it as.
        path: the file.
        what: what a user calls it, for messages.
        maker: the command that makes it.

    Raises:
        BundleError: the file is missing, too large, no JSON, or not of this kind and version.
    """
    article = "an" if what[0] in "aeiou" else "a"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_DOCUMENT_BYTES:
            raise BundleError(
                f"{path}: expected {article} {what}, a file of at most {LARGEST_DOCUMENT_BYTES // 2**20} MiB, found"
                f" {status.st_size} bytes or no file; make it again with: {maker}"
            )
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path.parent} holds no {what} ({path.name} is missing); make one with: {maker}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from None
    try:
        # First, since it refuses what is nested too deeply for json, which alone sees a key that is there twice.
        from_json(text, allow_inf_nan=False)
        found = json.loads(text, object_pairs_hook=_unique_keys)
        _check_text(found)
        _check_version(kind, found)
        return kind.model_validate_json(text, strict=True)
    except _OtherVersionError as error:
        cure = "update tc-deploy, or make it again with" if error.is_later else "make it again with"
        raise BundleError(f"{path}: {article} {what} of {error}; {cure}: {maker}") from None
    except ValidationError as error:
        where, reason = first_problem(error)
        reason = f"{where}: {reason}" if where else reason
    except ValueError as error:
        reason = f"cut short or altered, no JSON: {error}"
    raise BundleError(f"{path}: not {article} {what} of this version: {reason}; make it again with: {maker}")


class _OtherVersionError(Exception):
    """A document is of another format version.

    Args:
        found: of the document.
        read: of the class that it was to be read as.
    """

    def __init__(self, found: int, read: int) -> None:
        super().__init__(f"format {found}, and this tc-deploy reads format {read}")
        self.is_later = found > read


def _check_version(kind: type[Document], found: Any) -> None:
    """Tell a document that an older or newer tc-deploy wrote from one that is none.

    Raises:
        _OtherVersionError: it is of another version; the text says of which, and which is read.
    """
    field = kind.model_fields.get("format_version")
    version = found.get("format_version") if isinstance(found, dict) else None
    if field is not None and type(version) is int and version not in get_args(field.annotation):
        (expected,) = get_args(field.annotation)
        raise _OtherVersionError(version, expected)


def _check_text(found: Any) -> None:
    """Check that no key and no string would move the cursor or turn the text around when it is printed.

    Raises:
        ValueError: one would.
    """
    match found:
        case str() if UNPRINTABLE.search(found):
            raise ValueError(f"control characters in {printable(found)!r}")
        case dict():
            _check_text(list(found))
            _check_text(list(found.values()))
        case list():
            for item in found:
                _check_text(item)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys are there once.

    Raises:
        ValueError: one is there twice, so that readers differ in what they take.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


RECORD = "Record"
"""How the tags end that tell apart the classes of a value."""


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first thing lies that a document's class refuses, as a dotted key, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    # Which of several classes a value was read as is no key of the document; a key that nobody knows is one.
    unknown = first["loc"][-1:] if first["type"] == "extra_forbidden" else ()
    known = first["loc"][: len(first["loc"]) - len(unknown)]
    where = ".".join(map(str, [*(part for part in known if not str(part).endswith(RECORD)), *unknown]))
    found = repr(first["input"])
    found = found if len(found) < 80 else found[:77] + "…"
    match first["type"]:
        case "missing" if isinstance(first["loc"][-1], int):
            return where, f"a value is missing, found {found}"
        case "missing":
            return where, "this key is required and missing"
        case "extra_forbidden":
            return where, "unknown key"
        case "value_error":
            return where, str(first["ctx"]["error"])
    return where, f"{first['msg'].replace('Input should', 'must')}, found {found}"
