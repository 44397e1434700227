"""Folders that cannot be renamed, readers and writers at once, and what the disk says no to."""

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_bundle import MARKER, NOTE, make, names

from tc_deploy.bundle import MANIFEST, check_replaceable, claimed, kept_from_writers, new_folder, reading
from tc_deploy.bundle.folders import Claim
from tc_deploy.bundle.kinds import remove_names
from tc_deploy.errors import StorageError

TESTS = Path(__file__).parents[1]


def mount(options: str, folder: Path) -> None:
    done = subprocess.run(["mount", *options.split(), str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount (root, CAP_SYS_ADMIN)")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["tmpfs", "bind"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that is a mount point, as a container's volume is."""
    folder = tmp_path / "volume"
    folder.mkdir()
    (tmp_path / "disk").mkdir()
    mount("-t tmpfs -o size=1m tmpfs" if request.param == "tmpfs" else f"--bind {tmp_path / 'disk'}", folder)
    yield folder
    unmount(folder)


def test_a_mount_point_is_filled_and_replaced_where_it_is(volume: Path) -> None:
    with pytest.raises(OSError, match="busy"):
        volume.rename(volume.with_name("other"))
    (volume / "lost+found").mkdir()
    for content in ("first", "second"):
        make(volume, content)
        assert names(volume) == ["data", "lost+found", MANIFEST]
        assert (volume / "data").read_text() == content
    with new_folder(volume, NOTE) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "other").write_text("third")
        (staged / MANIFEST).write_text('{"note": ["deep/other"]}')
    assert names(volume) == ["deep", "lost+found", MANIFEST]
    make(volume, "fourth")
    assert names(volume) == ["data", "lost+found", MANIFEST]
    assert not list(volume.parent.glob(".volume*"))


def test_somebodys_mount_point_is_refused_before_the_work(volume: Path) -> None:
    (volume / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"it holds notes\.txt"):
        check_replaceable(volume, NOTE)
    assert names(volume) == ["notes.txt"]


def test_a_volume_that_is_full_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    mount("-t tmpfs -o size=64k tmpfs", folder)
    try:
        make(folder, "first")
        make(folder / "inside", "first")
        for place in (folder / "inside", folder / "new"):
            with pytest.raises(StorageError, match="cannot be written: No space left on device"):
                make(place, "x" * 100_000)
        (folder / "inside" / "data").unlink()
        remove_names(folder / "inside", [MANIFEST])
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            make(folder, "x" * 100_000)
        assert names(folder) == ["data", MANIFEST]
        assert (folder / "data").read_text() == "first"
    finally:
        unmount(folder)


CRASHES = """
import os, signal, sys
from pathlib import Path
from test_bundle import make

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
folder, number = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def hook(event, arguments):
    global seen
    if event in EVENTS:
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
make(folder, "second")
"""


def test_killed_at_any_moment_a_folder_that_stays_is_old_or_new_or_refused(tmp_path: Path) -> None:
    """The working directory keeps its place as a mount point does, and needs no right to mount."""
    found, number = set(), 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        make(folder, "first")
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            sys.argv = ["", str(folder), str(number)]
            exec(compile(CRASHES, "crashes", "exec"), {})
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        if (folder / MANIFEST).is_file():
            found.add((folder / "data").read_text())
        else:
            found.add("no marker")
        # The next reader puts it right where it can be.
        with reading(folder, NOTE):
            assert (folder / MANIFEST).read_text() == MARKER
            assert (folder / "data").read_text() in ("first", "second")
        make(folder, "third")
        assert (names(folder), (folder / "data").read_text()) == (["data", MANIFEST], "third")
    assert {path.name for path in tmp_path.iterdir()} == {str(index + 1) for index in range(number)}
    assert found == {"first", "second", "no marker"}


# ------------------------------------------------------------------------------------------------- readers and writers


def test_a_writer_waits_until_nobody_reads(tmp_path: Path) -> None:
    make(tmp_path / "bundle", "first")
    writer = threading.Thread(target=make, args=(tmp_path / "bundle", "second"))
    with reading(tmp_path / "bundle", NOTE):
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        assert (tmp_path / "bundle" / "data").read_text() == "first"
    writer.join(30)
    assert (tmp_path / "bundle" / "data").read_text() == "second"
    assert names(tmp_path) == ["bundle"]


def test_readers_do_not_wait_for_each_other_and_leave_nothing(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    with reading(tmp_path / "bundle", NOTE), reading(tmp_path / "bundle", NOTE):
        assert names(tmp_path / "bundle") == ["data", MANIFEST]
    with reading(tmp_path / "nothing", NOTE):
        assert names(tmp_path) == ["bundle"]


def test_a_dead_reader_blocks_nobody(tmp_path: Path) -> None:
    make(tmp_path / "bundle", "first")
    program = (
        "import os, sys; from test_bundle import NOTE, Path; from tc_deploy.bundle import reading\n"
        "with reading(Path(sys.argv[1]), NOTE):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "bundle")], cwd=TESTS, check=False)
    make(tmp_path / "bundle", "second")
    assert (tmp_path / "bundle" / "data").read_text() == "second"


def test_a_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    folder, stop, seen = tmp_path / "bundle", threading.Event(), []
    make(folder, "0")

    def read() -> None:
        while not stop.is_set():
            with reading(folder, NOTE):
                before = (folder / "data").read_text()
                time.sleep(0.002)
                seen.append(before == (folder / "data").read_text() and (folder / MANIFEST).is_file())
            time.sleep(0.01)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 15):
        make(folder, str(number))
    stop.set()
    for reader in readers:
        reader.join()
    assert len(seen) > 10
    assert all(seen)


def test_what_is_built_in_a_folder_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    with kept_from_writers(tmp_path / "bundle"), kept_from_writers(tmp_path / "bundle"):
        with pytest.raises(StorageError, match="another process is writing"):
            make(tmp_path / "bundle")
        make(tmp_path / "other")
    with (
        claimed(tmp_path / "bundle", NOTE),
        pytest.raises(StorageError, match="another process is writing"),
        kept_from_writers(tmp_path / "bundle"),
    ):
        pass
    make(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle", "other"]


# ------------------------------------------------------------------------------------------------ as it was found


def test_mode_and_owner_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    make(folder)
    folder.chmod(0o2750)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    before = folder.stat()
    make(folder, "second")
    after = folder.stat()
    assert (folder / "data").read_text() == "second"
    assert stat.S_IMODE(after.st_mode) == 0o2750
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


def test_an_empty_private_folder_stays_private(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir(mode=0o700)
    make(tmp_path / "bundle")
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o700


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "bundle", NOTE):
        _ = 1 / 0
    check_replaceable(tmp_path / "c" / "d" / "bundle", NOTE)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EBUSY, errno.EXDEV, errno.EMFILE, errno.ENAMETOOLONG]
)
@pytest.mark.parametrize("step", ["in the block", "at the commit"])
def test_what_the_disk_says_is_one_line_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    folder = tmp_path / "bundle"
    make(folder, "first")

    def fail(*names: object) -> None:
        raise OSError(number, os.strerror(number), *map(str, names[:1]))

    def fail_to_make() -> None:
        with new_folder(folder, NOTE) as staged:
            (staged / MANIFEST).write_text(MARKER)
            if step == "in the block":
                fail(staged / "data")
            monkeypatch.setattr(Claim, "_commit", lambda *_: fail())

    with pytest.raises(StorageError, match=f"{folder} cannot be written: {os.strerror(number)}") as raised:
        fail_to_make()
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["bundle"]
    assert (folder / "data").read_text() == "first"


def test_what_a_library_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    for words in ("I/O error: No space left on device (os error 28)", "write failed: No space left on device"):
        with (
            pytest.raises(StorageError, match="cannot be written: No space left on device"),
            new_folder(tmp_path / "bundle", NOTE),
        ):
            raise RuntimeError(words)


def test_an_error_of_another_file_is_not_the_outputs(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), new_folder(tmp_path / "bundle", NOTE):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")


@pytest.mark.parametrize("name", [None, "/elsewhere/engine.so"])
def test_an_error_of_what_the_block_runs_is_not_taken_for_one_of_writing(tmp_path: Path, name: str | None) -> None:
    words = (errno.EIO, "the engine's device is gone", *([] if name is None else [name]))
    with pytest.raises(OSError, match="the engine's device is gone"), new_folder(tmp_path / "out", NOTE):
        raise OSError(*words)
    assert names(tmp_path) == []
