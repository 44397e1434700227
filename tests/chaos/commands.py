"""Real commands in a folder of their own, stopped where and when a test says; and what they left there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

SERVER = Path(__file__).with_name("server.py")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 1800.0
"""A command that takes longer hangs. The slowest, a search, takes a minute on an idle machine; this one may be busy."""
PIPE_BYTES = 2**20
OURS = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130, 143})
"""The exit codes that ``errors.py`` draws, without that of a defect; 130 is Ctrl-C, 143 SIGTERM."""

Tree = dict[str, tuple[int, bytes]]
"""Mode and bytes by path; a folder has no bytes."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    words: tuple[str, ...]
    code: int | None
    """Less than 0: the signal that ended it; None: it hung."""
    out: str
    err: str
    points: tuple[str, ...]
    """The write points that it reached."""
    took_s: float

    @property
    def problem(self) -> str:
        """What a user may never see; empty if there is nothing of it."""
        if self.code is None:
            return "hung"
        if "Traceback" in self.err or "Traceback" in self.out:
            return "traceback: " + self.err.strip().splitlines()[-1]
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return "" if -self.code in (signal.SIGKILL, signal.SIGTERM) else f"ended by {name}"
        if self.code not in OURS:
            return f"exit code {self.code}: {self.err.strip()[-300:]}"
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if len(lines) != (self.code != 0):
            return f"exit code {self.code} with {len(lines)} error lines: {self.err.strip()[-300:]}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A command that was started."""

    pid: int
    words: tuple[str, ...]
    notes: Path
    pipes: tuple[int, ...]
    """Its output, its errors, and its write points."""
    start_s: float


def _pipe(path: Path) -> int:
    """A pipe with a name, and not a file, which would take part in a limit of files; it holds all that is said."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return descriptor


def _drained(descriptor: int) -> str:
    with open(descriptor, "rb") as pipe:
        return pipe.read().decode(errors="replace")


class Commands:
    """Runs commands as children of one process that has imported everything.

    Args:
        notes: where the children's outputs are kept.
    """

    def __init__(self, notes: Path) -> None:
        self.notes, self._number = notes, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        threads = self._answer()["ready"]
        if threads != 1:
            raise RuntimeError(f"the server has {threads} threads before its first fork, expected 1")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, request: Mapping[str, object]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def start(
        self,
        folder: Path,
        *words: object,
        stop_at: int = 0,
        by: int = signal.SIGKILL,
        limits: Mapping[str, int] | None = None,
    ) -> Running:
        """Start a command.

        Args:
            folder: its working directory, below which write points are counted.
            words: of the command line.
            stop_at: the write point, from 1, before which it gets the signal; 0 for none.
            by: that signal.
            limits: ``as``: bytes of memory beside what it has; ``nofile``: descriptors likewise; ``fsize``: bytes.
        """
        self._number += 1
        notes = self.notes / str(self._number)
        (notes / "temporary").mkdir(parents=True)
        texts = tuple(str(word) for word in words)
        names = {name: str(notes / name) for name in ("out", "err", "events")}
        pipes = tuple(_pipe(Path(path)) for path in names.values())
        names["temporary"] = str(notes / "temporary")
        request = {"do": "start", "words": texts, "folder": str(folder), "stop_at": stop_at, "signal": int(by)}
        answer = self._ask({**request, "limits": dict(limits or {}), **names})
        return Running(pid=answer["pid"], words=texts, notes=notes, pipes=pipes, start_s=time.monotonic())

    def wait(self, running: Running) -> Ended:
        """Wait for a command's end."""
        code = self._ask({"do": "wait", "pid": running.pid, "timeout_s": PATIENCE_S})["code"]
        took_s = time.monotonic() - running.start_s
        out, err, events = map(_drained, running.pipes)
        shutil.rmtree(running.notes)
        return Ended(words=running.words, code=code, out=out, err=err, points=tuple(events.splitlines()), took_s=took_s)

    def run(self, folder: Path, *words: object, after_s: float | None = None, **how: Any) -> Ended:
        """Run a command to its end, or stop it after some seconds."""
        running = self.start(folder, *words, **({} if after_s is not None else how))
        if after_s is not None:
            time.sleep(after_s)
            os.kill(running.pid, how.get("by", signal.SIGKILL))  # it is there until `wait` reaps it
        return self.wait(running)


def tree(folder: Path) -> Tree:
    """Everything below a folder."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = (mode, path.read_bytes() if stat.S_ISREG(mode) else b"")
    return found


def part(whole: Tree, name: str) -> Tree:
    """What of a tree is ``name`` or lies below it."""
    return {path: entry for path, entry in whole.items() if path == name or path.startswith(f"{name}/")}


def differences(found: Tree, expected: Tree) -> str:
    """Where two trees differ, in a line; empty where they do not."""
    said = [f"left behind: {path}" for path in found.keys() - expected.keys()]
    said += [f"missing: {path}" for path in expected.keys() - found.keys()]
    for path in found.keys() & expected.keys():
        if found[path][1] != expected[path][1]:
            said.append(f"other bytes: {path}")
        elif found[path][0] != expected[path][0]:
            said.append(f"mode {found[path][0]:o} for {expected[path][0]:o}: {path}")
    return "; ".join(sorted(said)[:6])
