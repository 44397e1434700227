"""A hidden folder that came along with a folder from elsewhere: it neither writes nor removes anything outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bundle import NOTE, make, names

from tc_deploy.bundle import MANIFEST, claimed, reading
from tc_deploy.errors import StorageError

OWNER = json.dumps({"kind": "holder", "format_version": 1, "made_by": "tc-deploy 0"})


def half_replaced(folder: Path, stale: object = ()) -> Path:
    """A folder without a marker, and one in it that is ready to be moved in; gives the latter."""
    ready = folder / ".tc-deploy" / "ready"
    (ready / "deep").mkdir(parents=True)
    (ready.parent / "owner.json").write_text(OWNER)
    (ready.parent / "stale.json").write_text(json.dumps(stale))
    (ready / "deep" / "data").write_text("new")
    (ready / MANIFEST).write_text('{"note": ["deep/data"]}')
    return ready


def read(folder: Path) -> None:
    with reading(folder, NOTE):
        pass


def write(folder: Path) -> None:
    with pytest.raises(StorageError, match="is in the way"), claimed(folder, NOTE):
        pass


def test_what_is_sound_is_moved_in(tmp_path: Path) -> None:
    half_replaced(tmp_path / "folder", ["old"])
    (tmp_path / "folder" / "old").write_text("old")
    read(tmp_path / "folder")
    assert names(tmp_path / "folder") == ["deep", MANIFEST]


@pytest.mark.parametrize("use", [read, write])
@pytest.mark.parametrize("stale", [["../victim"], ["/absolute"], ["link/victim"], [1], {"a": "b"}, "../victim"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, stale: object, use: Callable[[Path], None]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    half_replaced(tmp_path / "folder", [str(victim)] if stale == ["/absolute"] else stale)
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    use(tmp_path / "folder")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "folder" / MANIFEST).exists()


@pytest.mark.parametrize("use", [read, write])
def test_nothing_is_moved_through_a_link(tmp_path: Path, use: Callable[[Path], None]) -> None:
    (tmp_path / "home").mkdir()
    half_replaced(tmp_path / "folder")
    (tmp_path / "folder" / "deep").symlink_to(tmp_path / "home")
    use(tmp_path / "folder")
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("use", [read, write])
@pytest.mark.parametrize("part", ["ready", "ready/deep", "."])
def test_nothing_is_fetched_by_a_link(tmp_path: Path, part: str, use: Callable[[Path], None]) -> None:
    ready = half_replaced(tmp_path / "folder")
    place, home = ready.parent / part, tmp_path / "home"
    place.rename(home)
    place.symlink_to(home)
    before = names(home)
    use(tmp_path / "folder")
    assert names(home) == before


def test_a_link_in_the_place_of_the_old_folder_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "folder")
    make(tmp_path / "other")
    holder = tmp_path / ".folder.tc-deploy"
    holder.mkdir()
    (holder / "owner.json").write_text(OWNER)
    (holder / "old").symlink_to(tmp_path / "other")
    with claimed(tmp_path / "folder", NOTE):
        pass
    assert names(tmp_path / "other") == ["data", MANIFEST]


def test_what_somebody_added_is_not_moved_through_a_link(tmp_path: Path) -> None:
    make(tmp_path / "folder")
    (tmp_path / "home").mkdir()
    old = tmp_path / ".folder.tc-deploy" / "old"
    (old / "link").mkdir(parents=True)
    (old.parent / "owner.json").write_text(OWNER)
    (old / "link" / "theirs").write_text("theirs")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "home")
    with pytest.raises(StorageError, match="holds link"), claimed(tmp_path / "folder", NOTE):
        pass
    assert not list((tmp_path / "home").iterdir())


def test_a_reader_does_not_wait_for_somebodys_folder(tmp_path: Path) -> None:
    (tmp_path / ".folder.tc-deploy" / "old").mkdir(parents=True)
    read(tmp_path / "folder")
    assert names(tmp_path / ".folder.tc-deploy") == ["old"]
