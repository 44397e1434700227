"""A file of requests, a JSON object a line, and the folder that its pictures go to.

In: ``requests.jsonl``, whose lines are bodies as the server takes them, and a folder. Out: rows that are left to do;
what of them cannot be done, by its line; files, and a line for each row that is done in ``results.jsonl``. The pictures
are written before their line, so a run that was stopped goes on where it was. Never: runs an engine.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from tc_deploy import __version__
from tc_deploy.bundle import first_problem, locks, real_path, sha256_of_bytes, write_bytes
from tc_deploy.bundle.apart import check_apart
from tc_deploy.bundle.kinds import MADE_BY
from tc_deploy.bundle.storage import storage_errors
from tc_deploy.errors import StorageError, UsageError, first_line, no_file
from tc_deploy.manifest import Manifest
from tc_deploy.serving.wire import MOST_PICTURES, MOST_SEED, ApiError, Asked, ImagesBody, asked_of

RESULTS = "results.jsonl"
MOST_ROW_BYTES = 2**16
"""Of a line, as of a body that the server takes."""
MOST_ROWS = 10_000_000
MOST_FIRST_SEED = MOST_SEED - MOST_PICTURES - MOST_ROWS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line that can be done."""

    line: int
    """Its number, from 1."""
    body: str
    """JSON, with a seed."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a row."""

    line: int
    pictures: tuple[str, ...] = ()
    """Files in base64."""
    error: str | None = None
    """Why there are none."""


def asked_of_row(row: Row, manifest: Manifest, size: tuple[int, int]) -> Asked:
    """What a row asks of a bundle.

    Raises:
        ApiError: a field does not fit; names it.
    """
    asked = asked_of(ImagesBody.model_validate_json(row.body), manifest, size, MOST_PICTURES)
    if asked.stream:
        raise ApiError(400, "stream is for the server; a row gives files", param="stream")
    return asked


def read_rows(
    path: Path, manifest: Manifest, size: tuple[int, int], seed: int
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Read a file of requests.

    Args:
        path: the file.
        manifest: of the bundle that is to do them.
        size: height and width of its pictures.
        seed: of the first line, where a row gives none; the second has the next.

    Returns:
        The rows that can be done, and of the others the line and what is wrong.

    Raises:
        UsageError: it is no file, or has no row; the seed is too large.
    """
    if seed > MOST_FIRST_SEED:
        raise UsageError(f"--seed must be at most {MOST_FIRST_SEED} for a file of rows, found {seed}")
    rows: list[Row] = []
    bad: list[tuple[int, str]] = []
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = Row(line=line, body=_body(text, seed + line - 1))
            asked_of_row(row, manifest, size)
        except UsageError as error:
            bad.append((line, str(error)))
        except ApiError as error:
            bad.append((line, error.message))
        else:
            rows.append(row)
    if not rows and not bad:
        raise UsageError(f'{path}: holds no row; a row is a JSON object on a line, as {{"prompt": "a cat"}}')
    return rows, bad


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise UsageError(f"{path}: {no_file(path)}")
    try:
        with path.open("rb") as file:
            for number in range(1, MOST_ROWS + 1):
                text = file.readline(MOST_ROW_BYTES + 1)
                if not text:
                    return
                yield number, text
                while len(text) > MOST_ROW_BYTES and not text.endswith(b"\n"):
                    text = file.readline(MOST_ROW_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {first_line(error)}") from None
    raise UsageError(f"{path}: more than {MOST_ROWS} lines; split it")


def _body(text: bytes, seed: int) -> str:
    """A row's body, checked against the schema.

    Raises:
        UsageError: it is none.
    """
    if len(text) > MOST_ROW_BYTES:
        raise UsageError(f"a row has at most {MOST_ROW_BYTES} bytes")
    try:
        body = ImagesBody.model_validate_json(text)
    except ValidationError as error:
        where, reason = first_problem(error)
        raise UsageError(f"{where}: {reason}" if where else reason) from None
    return body.model_copy(update={} if body.seed is not None else {"seed": seed}).model_dump_json(exclude_none=True)


class Results:
    """The folder of a run; see :func:`results_in`."""

    def __init__(self, folder: Path, bundle_id: str, journal: IO[bytes], done: dict[int, dict[str, Any]]) -> None:
        self._folder, self._bundle_id, self._journal, self._done = folder, bundle_id, journal, done

    def left(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are not done: no line says so, or of another request or bundle, or a file is gone."""
        return [row for row in rows if not self._is_done(row)]

    def write(self, row: Row, pictures: Sequence[str]) -> None:
        """Write a row's pictures, and then that it is done.

        Raises:
            StorageError: the folder cannot be written.
        """
        body = json.loads(row.body)
        suffix = {"jpeg": "jpg"}.get(body.get("output_format"), body.get("output_format") or "png")
        names = [f"{row.line:06}-{body['seed'] + number}.{suffix}" for number in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            write_bytes(self._folder / name, base64.b64decode(picture))
        fields = {"line": row.line, "files": names, "seed": body["seed"], "made_by": f"{MADE_BY}{__version__}"}
        text = json.dumps(fields | self._identity(row))
        with storage_errors(self._folder / RESULTS):
            self._journal.write(f"{text}\n".encode())

    def _identity(self, row: Row) -> dict[str, str]:
        return {"request": sha256_of_bytes(row.body.encode())[:16], "bundle": self._bundle_id}

    def _is_done(self, row: Row) -> bool:
        found = self._done.get(row.line, {})
        if not self._identity(row).items() <= found.items():
            return False
        return all((self._folder / name).is_file() for name in found["files"])


@contextmanager
def results_in(folder: Path, bundle_id: str, *, reads: Sequence[Path]) -> Iterator[Results]:
    """Open the folder of a run, which only this process writes meanwhile.

    Args:
        folder: new, empty, or of an earlier run.
        bundle_id: of the bundle that makes the pictures.
        reads: files and folders that the same command reads.

    Raises:
        StorageError: it cannot be written, holds something else, or another process writes it.
    """
    path = folder / RESULTS
    with storage_errors(folder):
        check_apart(folder, real_path(folder), reads)
        if folder.exists() and not path.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} holds something else than {RESULTS} and its pictures; choose another -o")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = locks.acquire(path)
        except BlockingIOError:
            raise StorageError(f"{folder}: another process writes it; wait for its end, or choose another -o") from None
    with open(descriptor, "r+b", buffering=0) as journal:  # noqa: PTH123 - a descriptor
        done, end = _read_results(path, journal)
        with storage_errors(path):
            # What a process that was killed had begun to write.
            journal.truncate(end)
            journal.seek(end)
        yield Results(folder, bundle_id, journal, done)


def _read_results(path: Path, journal: IO[bytes]) -> tuple[dict[int, dict[str, Any]], int]:
    """What is done, by line, and where the last whole line ends."""
    done: dict[int, dict[str, Any]] = {}
    end = 0
    for number, text in enumerate(journal, start=1):
        if not text.endswith(b"\n"):
            break
        try:
            found = json.loads(text)
            names = [str(name) for name in found["files"]]
            if not str(found["made_by"]).startswith(MADE_BY) or any(Path(name).name != name for name in names):
                raise ValueError
            done[int(found["line"])] = found
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StorageError(f"{path}:{number} is no line that tc-deploy wrote; choose another -o") from None
        end += len(text)
    return done, end
