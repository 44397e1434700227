"""What takes long to make and is the same every time: made once for all workers and runs, and kept on disk.

In: a name and a function that fills a folder. Out: that folder, under a key of all that its contents depend on. It
stays where it was made, since plans name their model by its path; tests take copies of what they may change.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from tc_deploy.hardware import cpu_and_features

ROOT = Path(__file__).parents[1]
LEFT = 3
"""Versions of an entry that are left: sources change often, and take up to ten megabytes each time."""
DONE = ".done"
"""Written last: the checksum of everything else."""


class Keep:
    """Gives kept folders.

    Args:
        root: where they lie, for all processes.
        away: a folder of this process's own, in which it works while it makes one: below the working directory a plan
            would name its model by a relative path, which a copy of the plan has not.
    """

    def __init__(self, root: Path, away: Path) -> None:
        self.root, self.away = root, away

    def __call__(self, name: str, make: Callable[[Path], object], *, by_commands: bool = False, file: str = "") -> Path:
        """The folder that ``make`` fills, made unless it is there.

        Args:
            name: of one function and its settings.
            make: fills an empty folder; reaches no more than calibration, export and helpers of tests.
            by_commands: it runs the command line, so that all sources count.
            file: ``__file__`` of a test that ``make`` is defined in.
        """
        key = _key(by_commands=by_commands, file=file)
        entry = self.root / f"{name}-{key}"
        with _locked(self.root / f"{name}.lock"):
            if not _is_whole(entry):
                shutil.rmtree(entry, ignore_errors=True)
                entry.mkdir(parents=True)
                with contextlib.chdir(self.away):
                    make(entry)
                (entry / DONE).write_text(_checksum(entry), encoding="ascii")
            (entry / DONE).touch()
            self._clean(name)
        return entry

    def _clean(self, name: str) -> None:
        """Remove the versions that were asked for the longest time ago."""
        versions = [path for path in self.root.glob(f"{name}-*") if len(path.name) == len(name) + 1 + _KEY_LENGTH]
        for path in sorted(versions, key=_last_asked_for)[:-LEFT]:
            shutil.rmtree(path)


_KEY_LENGTH = 16


@functools.cache
def _key(*, by_commands: bool, file: str) -> str:
    """Of sources, helpers of tests, the machine and every library."""
    away = set() if by_commands else _rooms_above_export()
    sources = [
        path for path in ROOT.glob("tc_deploy/**/*.py") if path.relative_to(ROOT).parts[1].split(".")[0] not in away
    ]
    sources += [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_")]
    sources += [ROOT / "examples" / "uvit.py", *([Path(file)] if file else [])]
    facts = [sys.version, *map(str, cpu_and_features())]
    facts += sorted(f"{found.name}=={found.version}" for found in importlib.metadata.distributions())
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sorted(sources):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:_KEY_LENGTH]


def _rooms_above_export() -> set[str]:
    """Rooms that calibration and export do not import: the import contract keeps it so."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (each["layers"] for each in document["tool"]["importlinter"]["contracts"] if each["id"] == "rooms")
    above = layers[: layers.index("(export)")]
    return {room.strip(" ()") for layer in above for room in re.split("[|:]", layer)}


def _checksum(entry: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(entry.rglob("*")):
        if path.is_file() and path != entry / DONE:
            digest.update(f"\0{path.relative_to(entry)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_whole(entry: Path) -> bool:
    """Whether an entry is as it was made: not half made by a process that died, nor changed since."""
    return (entry / DONE).is_file() and (entry / DONE).read_text(encoding="ascii") == _checksum(entry)


def _last_asked_for(entry: Path) -> float:
    return (entry / DONE).stat().st_mtime if (entry / DONE).is_file() else 0.0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
