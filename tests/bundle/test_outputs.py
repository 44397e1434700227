"""Single files: nothing of a user's is replaced unasked, and never an input, whatever name it is given."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, PngImagePlugin

from tc_deploy.bundle import FileKind, check_output, write_bytes, write_output
from tc_deploy.bundle.marks import ARRAYS_FILE, JSON_FILE, NUMPY_FILE, SHEET_FILE
from tc_deploy.errors import StorageError

NOTE = FileKind(name="a note", is_ours=lambda path: path.read_bytes().startswith(b"note"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, data: bytes = b"note 2", *, reads: tuple[Path, ...] = (), force: bool = False) -> None:
    check_output(path, NOTE, reads=reads, force=force)
    write_output(path, data)


def test_a_file_of_ours_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out"
    put(path, b"note 1")
    path.chmod(0o600)
    put(path)
    assert path.read_bytes() == b"note 2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["out"]


def test_somebodys_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("thesis")
    with pytest.raises(StorageError, match=r"exists and is not a note that tc-deploy wrote; .*--force"):
        put(path)
    assert path.read_text() == "thesis"
    put(path, force=True)
    assert path.read_bytes() == b"note 2"


def test_a_format_that_cannot_say_who_wrote_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(StorageError, match=r"exists and an \.npy file cannot say who wrote it; .*--force"):
        check_output(path, NUMPY_FILE)
    check_output(path, NUMPY_FILE, force=True)


def test_an_empty_file_holds_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    put(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"note 2"


@pytest.mark.parametrize(
    "way", ["itself", "spelled", "link", "hard", "linked folder", "below", "new in it", "through a link in it"]
)
def test_an_input_is_never_written_not_even_when_asked(tmp_path: Path, way: str) -> None:
    inputs = tmp_path / "inputs"
    (inputs / "deep").mkdir(parents=True)
    weights = inputs / "deep" / "weights"
    weights.write_bytes(b"note: the only copy")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "blob").write_bytes(b"note: a blob")
    (inputs / "linked").symlink_to(tmp_path / "blobs" / "blob")
    (tmp_path / "also").symlink_to(inputs)
    (tmp_path / "hard").hardlink_to(weights)
    (tmp_path / "link").symlink_to(weights)
    output, reads = {
        "itself": (weights, weights),
        "spelled": (inputs / ".." / "inputs" / "deep" / "weights", weights),
        "link": (tmp_path / "link", weights),
        "hard": (tmp_path / "hard", inputs),
        "linked folder": (tmp_path / "also" / "deep" / "weights", inputs),
        "below": (weights, tmp_path / "also"),
        "new in it": (inputs / "deep" / "new", inputs),
        "through a link in it": (tmp_path / "blobs" / "blob", inputs),
    }[way]
    with pytest.raises(StorageError, match="which this command reads"):
        put(output, reads=(reads,), force=True)
    assert weights.read_bytes() == b"note: the only copy"
    assert (tmp_path / "blobs" / "blob").read_bytes() == b"note: a blob"
    assert names(inputs / "deep") == ["weights"]


def test_beside_an_input_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    put(tmp_path / "inputs-2", reads=(tmp_path / "inputs", tmp_path / "missing"))
    assert (tmp_path / "inputs-2").read_bytes() == b"note 2"


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"note 1")
    (tmp_path / "out").symlink_to("far/file")
    (tmp_path / "dangling").symlink_to("far/new")
    put(tmp_path / "out")
    put(tmp_path / "dangling")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == (tmp_path / "far" / "new").read_bytes() == b"note 2"


def test_a_device_node_is_written_through(tmp_path: Path) -> None:
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    put(null)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert null.is_symlink()


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="/dev/full cannot be written: No space left on device"):
        put(Path("/dev/full"))


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    put(pipe)
    reader.join(10)
    assert got == [b"note 2"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_what_stdout_leads_to_is_added_to(tmp_path: Path, name: str) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from bundle.test_outputs import *\n"
        "print('before', flush=True); put(Path(sys.argv[1])); print(' after', flush=True)"
    )
    with (tmp_path / "all").open("wb") as file:
        tests = str(Path(__file__).parents[1])
        subprocess.run([sys.executable, "-c", program, name, tests], stdout=file, check=True)
    assert (tmp_path / "all").read_text() == "before\nnote 2 after\n"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="it is a folder"):
        put(tmp_path, force=True)


@pytest.mark.parametrize("name", ["x" * 250, "file/out", "loop"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match="cannot be written"):
        check_output(tmp_path / name, NOTE)
    assert names(tmp_path) == ["file", "loop"]


def test_a_check_leaves_no_folders(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out", NOTE)
    assert names(tmp_path) == []
    put(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_what_a_killed_process_left_of_a_file_is_swept(tmp_path: Path) -> None:
    program = (
        "import os, sys; from tc_deploy.bundle import outputs, write_bytes; from pathlib import Path\n"
        "outputs.os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "write_bytes(Path(sys.argv[1]), b'note 1')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    (left,) = names(tmp_path)
    others = [".out.1234", ".out.tc-deploy", f"{left}.txt", left.replace(".out.", ".other.")]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    write_bytes(tmp_path / "out", b"note 2")
    assert names(tmp_path) == sorted(["out", *others])


def test_what_another_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    program = (
        "import sys, time; from tc_deploy.bundle import outputs, write_bytes; from pathlib import Path\n"
        "outputs.os.fsync = lambda _: (print(flush=True), sys.stdin.readline())\n"
        "write_bytes(Path(sys.argv[1]), b'note 1')"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        write_bytes(tmp_path / "out", b"note 2")
        assert (tmp_path / "out").read_bytes() == b"note 2"
        other.stdin.write("\n")
        other.stdin.close()
    assert other.returncode == 0
    assert (tmp_path / "out").read_bytes() == b"note 1"
    assert names(tmp_path) == ["out"]


def test_files_are_ours_by_what_they_say_of_themselves(tmp_path: Path) -> None:
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", "tc-deploy")
    picture = Image.new("L", (4, 4))
    picture.save(tmp_path / "ours.png", pnginfo=mark)
    picture.save(tmp_path / "theirs.png")
    arrays = {"x": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "ours.safetensors", {"made_by": "tc-deploy 0.1.0"})
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    (tmp_path / "ours.json").write_text('{"made_by": "tc-deploy 0.1.0"}')
    (tmp_path / "theirs.json").write_text('{"made_by": "somebody"}')
    (tmp_path / "lying.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    (tmp_path / "short.safetensors").write_bytes(b"\1")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    found = {
        path.name
        for path in tmp_path.iterdir()
        for kind, suffix in ((SHEET_FILE, ".png"), (ARRAYS_FILE, ".safetensors"), (JSON_FILE, ".json"))
        if path.suffix == suffix and kind.is_ours(path)
    }
    assert found == {"ours.png", "ours.safetensors", "ours.json"}
