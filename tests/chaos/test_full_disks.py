"""Disks that are full or may not be written, and processes that get no more memory, descriptors or bytes.

One line and an exit code of ours; the old output or the new one; and when there is room again, the same bytes as ever.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos.commands import Commands, Ended, differences, tree
from chaos.stages import STAGES, Inputs, Reference

pytestmark = pytest.mark.chaos

References = Callable[[str], Reference]
NAMES = [name for name in STAGES if name != "plan"]
LEVELS = 6
"""Sizes of disk per stage, from no room at all to nearly enough."""
PAGE_BYTES = 4096
MIB = 2**20


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def may_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    # Where root is no real root, as in most containers, the kernel refuses.
    return subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="needs root, to mount a small disk")


@contextmanager
def disk(arena: Path, options: str) -> Iterator[None]:
    """Make the arena a disk of its own; the path stays, as it may stand in what is written."""
    mount("-t", "tmpfs", "-o", options, "chaos", arena)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(arena)], check=True, capture_output=True)


def check(reference: Reference, ended: Ended, arena: Path, where: str, faults: list[str]) -> None:
    """What a command may leave that ran out of something: all or nothing, and its state if it is to go on."""
    now = tree(arena)
    if ended.problem:
        faults.append(f"{where}: {ended.problem}")
    if ended.code == 0:
        difference = differences(now, reference.after)
    else:
        before = {path: entry for path, entry in now.items() if not reference.is_state(path)}
        difference = differences(before, reference.before)
    if difference:
        faults.append(f"{where}, exit code {ended.code}: {difference}")


def _is_gone(reference: Reference, arena: Path) -> bool:
    return reference.state_of(tree(arena)) == "none"


def verdict(faults: list[str], tally: Counter[str]) -> None:
    tally["faults"] += len(faults)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


def pages_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE_BYTES) for path in folder.rglob("*") if path.is_file())


@needs_mount
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(
    name: str, references: References, inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]
) -> None:
    reference, faults = references(name), list[str]()
    inputs.lay(reference.stage, arena)
    before = pages_of(arena)
    commands.run(arena, *reference.stage.words)
    more = max(pages_of(arena), before) + 2
    for level in range(LEVELS):
        with disk(arena, f"size={(before + 2 * more + 8) * PAGE_BYTES}"):
            inputs.lay(reference.stage, arena)
            free = int((more - before if level else 0) * level / LEVELS) + level
            mount("-o", f"remount,size={(before + free) * PAGE_BYTES}", arena)
            ended = commands.run(arena, *reference.stage.words)
            where = f"{name}, {free} pages free"
            check(reference, ended, arena, where, faults)
            tally["commands on a full disk"] += 1
            tally["of them refused with one line "] += ended.code == 8
            mount("-o", f"remount,size={(before + 4 * more + 64) * PAGE_BYTES}", arena)
            again = commands.run(arena, *reference.stage.words)
            if again.code != 0 or differences(tree(arena), reference.after):
                faults.append(
                    f"{where}, with room again: {again.err[-200:]} {differences(tree(arena), reference.after)}"
                )
    verdict(faults, tally)


@needs_mount
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_without_inodes(
    name: str, references: References, inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]
) -> None:
    reference, faults = references(name), list[str]()
    for free in (0, 1, 2, 3, 5, 8):
        with disk(arena, f"size=64m,nr_inodes={len(reference.before) + 1 + free}"):
            inputs.lay(reference.stage, arena)
            ended = commands.run(arena, *reference.stage.words)
            check(reference, ended, arena, f"{name}, {free} inodes free", faults)
            tally["commands on a full disk"] += 1
            tally["of them refused with one line "] += ended.code == 8
    verdict(faults, tally)


@needs_mount
@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk(
    name: str, references: References, inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]
) -> None:
    reference, faults = references(name), list[str]()
    with disk(arena, "size=64m"):
        inputs.lay(reference.stage, arena)
        mount("-o", "remount,ro", arena)
        ended = commands.run(arena, *reference.stage.words)
        check(reference, ended, arena, f"{name}, read-only", faults)
        if ended.code != 8:
            faults.append(f"{name}, read-only: expected exit code 8, found {ended.code}: {ended.err[-200:]}")
        tally["commands on a read-only disk"] += 1
    verdict(faults, tally)


@needs_mount
@pytest.mark.parametrize(
    "words",
    [
        ("generate", "bundle", "--class-label", 1, "-o"),
        ("report", "cal", "-o"),
        ("export", "cal", "-o"),
        ("calibrate", "recipe.toml", "-o"),
    ],
    ids=lambda words: words[0],
)
def test_inputs_on_a_read_only_disk_are_read(
    words: tuple[object, ...], inputs: Inputs, commands: Commands, arena: Path, tmp_path: Path, tally: Counter[str]
) -> None:
    """A container's image is read-only, and holds the bundle that it serves."""
    with disk(arena, "size=64m"):
        for name, place in (("built", "bundle"), ("plan", "cal"), ("model", "model"), ("recipe.toml", "recipe.toml")):
            source = inputs.path(name)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, arena / place)
        before = tree(arena)
        mount("-o", "remount,ro", arena)
        suffix = ".npy" if words[0] == "generate" else ".html" if words[0] == "report" else ""
        ended = commands.run(arena, *words, tmp_path / f"made{suffix}")
        assert (ended.problem, ended.code) == ("", 0), ended.err
        assert tree(arena) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"made{suffix}"]
    tally["commands on a read-only disk"] += 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("limit", "values"),
    [("fsize", (0, 1, 300, 3000, 20000)), ("nofile", (1, 2, 3, 4, 6, 9)), ("as", (0, 1, 4, 16, 48, 96))],
)
def test_limits_of_a_process(
    name: str,
    limit: str,
    values: tuple[int, ...],
    references: References,
    inputs: Inputs,
    commands: Commands,
    arena: Path,
    tally: Counter[str],
) -> None:
    reference, faults = references(name), list[str]()
    for value in values:
        inputs.lay(reference.stage, arena)
        limits = {limit: value * MIB if limit == "as" else value}
        ended = commands.run(arena, *reference.stage.words, limits=limits)
        where = f"{name}, RLIMIT_{limit.upper()} {value}"
        if limit == "as" and ended.code in (-signal.SIGABRT, -signal.SIGSEGV):
            # A library's thread in C++ or Rust that gets no memory calls abort(), and a kernel may use the null that it
            # got: no handler of Python's runs. It is as if it had been killed, and the same is asked of it: the old
            # output or the new one, and the same bytes after the next run.
            tally["ended by a library that got no memory"] += 1
        elif ended.problem:
            faults.append(f"{where}: {ended.problem}")
        if reference.state_of(tree(arena)) == "other" or (reference.stage.replaces and _is_gone(reference, arena)):
            faults.append(f"{where}, exit code {ended.code}: neither the old output nor the new one")
        # To look into a folder takes a descriptor, and to tidy up takes memory; the next run does it then. A limit of a
        # file's size is no excuse.
        left = reference.left_behind(tree(arena))
        if left and limit == "fsize" and ended.code:
            faults.append(f"{where}: left {left[:4]}")
        tally["of these that left what the next run swept"] += bool(left and ended.code)
        again = commands.run(arena, *reference.stage.words)
        if again.code != 0 or differences(tree(arena), reference.after):
            faults.append(f"{where}, without the limit: {again.err[-200:]} {differences(tree(arena), reference.after)}")
        tally["commands under RLIMIT_AS, RLIMIT_NOFILE or RLIMIT_FSIZE"] += 1
    verdict(faults, tally)
