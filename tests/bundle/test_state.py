"""The state of stopped work stays until the same work is done, and holds nothing but our own to remove."""

import json
import shutil
from pathlib import Path

import pytest

from tc_deploy.bundle import claimed, clear_state, state_folder, write_state
from tc_deploy.errors import StorageError
from tc_deploy.plan import PLAN_FOLDER

DIGITS = Path(__file__).parents[2] / "calibration" / "digits"


def paths(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_state_stays_and_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
            folder = state_folder(claim, "calibrate", "0123")
            write_state(folder / "deep" / "a", b"1")
            write_state(folder / "b", b"2")
    assert (folder / "deep" / "a").read_bytes() == b"1"
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        clear_state(state_folder(claim, "calibrate", "0123"))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_died_while_it_noted_a_name_loses_no_other(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = state_folder(claim, "calibrate", "0")
        write_state(folder / "first", b"1")
        with (folder / "state.files").open("ab") as file:
            file.write(b'\n"seco')
        for content in (b"2", b"3"):
            write_state(folder / "second\nline", content)
        clear_state(folder)
    assert list(tmp_path.iterdir()) == []


def test_the_thousandth_file_costs_no_more_than_the_first(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = state_folder(claim, "calibrate", "0")
        record = (folder / "state.json").stat()
        grown = []
        for index in range(40):
            before = sum(path.stat().st_size for path in folder.glob("state.*"))
            write_state(folder / f"{index:04}", b"x")
            grown.append(sum(path.stat().st_size for path in folder.glob("state.*")) - before)
        assert set(grown) == {len(b'\n"0000"')}
        assert (folder / "state.json").stat() == record
        clear_state(folder)


def test_state_of_an_earlier_version_is_removed_too(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = state_folder(claim, "calibrate", "0")
        record = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(record | {"files": ["old"]}))
        (folder / "old").touch()
        clear_state(folder)
    assert list(tmp_path.iterdir()) == []


def test_work_removes_its_own_state_and_no_other(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folders = [state_folder(claim, *which) for which in (("calibrate", "0"), ("calibrate", "1"), ("plan", "0"))]
        for folder in folders:
            write_state(folder / "kept", b"x")
        clear_state(folders[0])
    assert [folder.is_dir() for folder in folders] == [False, True, True]


def test_a_foreign_file_in_it_is_kept(tmp_path: Path) -> None:
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = state_folder(claim, "calibrate", "0")
        write_state(folder / "deep" / "ours", b"x")
        (folder / "deep" / "notes.txt").write_text("precious")
        (folder.parent / "mine.txt").write_text("precious")
        clear_state(folder)
    assert paths(tmp_path) == [
        ".plan.tc-deploy/calibrate-0/deep/notes.txt",
        ".plan.tc-deploy/mine.txt",
        ".plan.tc-deploy/owner.json",
    ]


def test_a_record_that_names_what_is_outside_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with claimed(tmp_path / "plan", PLAN_FOLDER) as claim:
        folder = state_folder(claim, "calibrate", "0")
        record = json.loads((folder / "state.json").read_text())
        record["files"] = ["../../precious", str(tmp_path / "precious")]
        (folder / "state.json").write_text(json.dumps(record))
        clear_state(folder)
    assert paths(tmp_path) == ["precious"]


def test_somebodys_folder_of_that_name_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".plan.tc-deploy").mkdir()
    (tmp_path / ".plan.tc-deploy" / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match="is in the way"), claimed(tmp_path / "plan", PLAN_FOLDER):
        pass
    assert paths(tmp_path) == [".plan.tc-deploy/notes.txt"]


def test_one_output_has_one_writer(tmp_path: Path) -> None:
    shutil.copytree(DIGITS, tmp_path / "plan")
    with claimed(tmp_path / "plan", PLAN_FOLDER):
        with (
            pytest.raises(StorageError, match=r"another process is writing .*plan; wait for it to end"),
            claimed(tmp_path / "plan", PLAN_FOLDER),
        ):
            pass
        with claimed(tmp_path / "other", PLAN_FOLDER):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
