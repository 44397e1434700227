"""Kept folders are made once, whoever asks; again where something that they depend on, or they themselves, changed."""

import concurrent.futures
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import kept
import pytest
from kept import DONE, LEFT, Keep


@pytest.fixture
def keep(tmp_path: Path) -> Keep:
    (tmp_path / "away").mkdir()
    return Keep(tmp_path / "kept", tmp_path / "away")


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Path], None]:
    return Writer(tmp_path / "log")


class Writer:
    """Writes a file, and a line of a log each time."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, folder: Path) -> None:
        with self.log.open("a") as file:
            file.write("made\n")
        assert not folder.is_relative_to(Path.cwd())
        (folder / "file").write_text("content")

    @property
    def times(self) -> int:
        return len(self.log.read_text().splitlines())


def test_it_is_made_once(keep: Keep, make: Writer) -> None:
    before = Path.cwd()
    first, second = keep("name", make), keep("name", make)
    assert first == second
    assert (first / "file").read_text() == "content"
    assert make.times == 1
    assert Path.cwd() == before


def test_processes_that_ask_at_once_wait_for_the_first(keep: Keep, make: Writer) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as processes:
        waiting = [processes.submit(_ask, keep.root, keep.away, make.log) for _ in range(4)]
        assert len({future.result() for future in waiting}) == 1
    assert make.times == 1


def _ask(root: Path, away: Path, log: Path) -> Path:
    return Keep(root, away)("name", Writer(log))


@pytest.mark.parametrize("damage", ["changed", "added", "half made"])
def test_what_is_not_as_it_was_made_is_made_again(keep: Keep, make: Writer, damage: str) -> None:
    entry = keep("name", make)
    if damage == "changed":
        (entry / "file").write_text("other")
    elif damage == "added":
        (entry / "more").write_text("")
    else:
        (entry / DONE).unlink()
    assert keep("name", make) == entry
    assert make.times == 2
    assert sorted(path.name for path in entry.iterdir()) == [DONE, "file"]


def test_a_failure_leaves_nothing_that_is_taken(keep: Keep, make: Writer) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        keep("name", fail)
    assert (keep("name", make) / "file").read_text() == "content"


def test_the_versions_asked_for_last_are_left(keep: Keep, make: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []
    for version in range(LEFT + 2):
        monkeypatch.setattr(kept, "_key", lambda *, by_commands, file, version=version: f"{version:016}")
        entries.append(keep("name", make))
        keep("name-too", make)
    assert [entry.exists() for entry in entries] == [False] * 2 + [True] * LEFT
    assert len(list(keep.root.glob("name-too-*"))) == LEFT


def test_the_key_follows_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for room in ("models", "cli"):
        (tmp_path / "tc_deploy" / room).mkdir(parents=True)
        (tmp_path / "tc_deploy" / room / "file.py").write_text("")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "uvit.py").write_text("")
    shutil.copy(kept.ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(kept, "ROOT", tmp_path)

    def keys() -> list[str]:
        kept._key.cache_clear()
        return [kept._key(by_commands=by_commands, file="") for by_commands in (False, True)]

    try:
        before = keys()
        assert keys() == before
        (tmp_path / "tc_deploy" / "cli" / "file.py").write_text("changed")
        of_commands = keys()
        assert of_commands[0] == before[0]
        assert of_commands[1] != before[1]
        (tmp_path / "tc_deploy" / "models" / "file.py").write_text("changed")
        assert all(mine != theirs for mine, theirs in zip(keys(), of_commands, strict=True))
    finally:
        kept._key.cache_clear()
