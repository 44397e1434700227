"""Folders on disk: whole or not there, whatever happens while they are written; and what a reader refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy import bundle
from tc_deploy.bundle import (
    MANIFEST,
    Document,
    FileRecord,
    FolderKind,
    NotOursError,
    canonical_json,
    check_files,
    file_records,
    new_folder,
    read_document,
    write_bytes,
)
from tc_deploy.errors import UNPRINTABLE, BundleError, StorageError

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Note(Document):
    """A small document."""

    text: str
    number: int = 0
    ratio: float = 0.0


def note_names(folder: Path) -> list[str]:
    try:
        return [*json.loads((folder / MANIFEST).read_text())["note"], MANIFEST]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NotOursError(f"no note: {error}") from None


NOTE = FolderKind(name="a note", marker=MANIFEST, names=note_names)
MARKER = '{"note": ["data"]}'


def make(folder: Path, content: str = "first") -> None:
    with new_folder(folder, NOTE) as temporary:
        (temporary / "data").write_text(content)
        (temporary / MANIFEST).write_text(MARKER)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- canonical JSON


@given(JSON_VALUES)
def test_canonical_json_reads_back(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), JSON_VALUES, min_size=2))
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_lacks(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"number": number})


# ------------------------------------------------------------------------------------------------ making a new folder


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made" / "deep", NOTE) as temporary:
        (temporary / MANIFEST).write_text(MARKER)
        assert not (tmp_path / "made" / "deep").exists()
    assert names(tmp_path / "made") == ["deep"]
    assert names(tmp_path / "made" / "deep") == [MANIFEST]


def test_new_folder_replaces_one_of_its_kind(tmp_path: Path) -> None:
    make(tmp_path / "bundle", "first")
    make(tmp_path / "bundle", "second")
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["data", MANIFEST]
    assert (tmp_path / "bundle" / "data").read_text() == "second"


def test_new_folder_fills_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    make(tmp_path / "bundle")
    assert names(tmp_path / "bundle") == ["data", MANIFEST]


def test_new_folder_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "bundle").symlink_to("large-disk")
    for content in ("first", "second"):
        make(tmp_path / "bundle", content)
        assert (tmp_path / "large-disk" / "data").read_text() == content
    assert (tmp_path / "bundle").is_symlink()
    assert names(tmp_path) == ["bundle", "large-disk"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_exception_changes_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def interrupted_make() -> None:
        with new_folder(tmp_path / "bundle", NOTE) as temporary:
            (temporary / MANIFEST).write_text(MARKER)
            raise interruption

    with pytest.raises(interruption):
        interrupted_make()
    assert names(tmp_path) == []
    make(tmp_path / "bundle")
    with pytest.raises(interruption):
        interrupted_make()
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / "data").read_text() == "first"


def test_a_block_that_forgets_the_marker_is_caught(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    with pytest.raises(RuntimeError, match=MANIFEST), new_folder(tmp_path / "bundle", NOTE):
        pass
    assert names(tmp_path / "bundle") == ["data", MANIFEST]


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_is_not_ours_is_refused_untouched(tmp_path: Path, content: str) -> None:
    foreign = tmp_path / "foreign"
    if content == "file":
        foreign.write_text("precious")
    else:
        foreign.mkdir()
        (foreign / "precious").touch()
    with pytest.raises(
        StorageError, match=f"{foreign} (exists and holds no {MANIFEST}.* it holds precious|is no folder)"
    ):
        make(foreign)
    assert names(tmp_path) == ["foreign"]
    assert foreign.read_text() == "precious" if content == "file" else names(foreign) == ["precious"]


@pytest.mark.parametrize("depth", ["bundle", "deeper/bundle"])
def test_an_unwritable_place_is_refused(tmp_path: Path, depth: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StorageError, match=f"cannot be written: {tmp_path}/file is a file, not a folder"):
        make(tmp_path / "file" / depth)
    with pytest.raises(StorageError, match=f"cannot be written: {tmp_path}/file is a file, not a folder"):
        write_bytes(tmp_path / "file" / depth, b"text")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_name_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written: File name too long"):
        make(tmp_path / ("x" * 255))


def test_a_second_writer_is_refused_as_often_as_it_tries(tmp_path: Path) -> None:
    with new_folder(tmp_path / "bundle", NOTE) as temporary:
        for _ in range(2):
            with pytest.raises(StorageError, match="another process is writing"):
                make(tmp_path / "bundle")
        assert temporary.is_dir()
        (temporary / MANIFEST).write_text(MARKER)
    assert names(tmp_path) == ["bundle"]


def test_a_writer_in_another_process_is_refused(tmp_path: Path) -> None:
    program = "import sys; from test_bundle import make, Path; make(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path / "bundle")]
    with new_folder(tmp_path / "bundle", NOTE) as temporary:
        (temporary / MANIFEST).write_text(MARKER)
        other = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "StorageError: another process is writing" in other.stderr
    assert names(tmp_path / "bundle") == [MANIFEST]


CRASHES = """
import os, signal, sys
from pathlib import Path
from test_bundle import make

root, first = Path(sys.argv[1]), sys.argv[2] == "replace"
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def crash_at(number):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

number = 0
while True:
    number += 1
    folder = root / str(number) / "bundle"
    if first:
        make(folder, "first")
    child = os.fork()
    if child == 0:
        crash_at(number)
        make(folder, "second")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
print(number)
"""


@pytest.mark.parametrize("before", ["replace", "create"])
def test_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, before: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path), before],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    crashes = int(answer.stdout) - 1
    assert crashes >= 8
    found = set()
    for number in range(1, crashes + 1):
        parent = tmp_path / str(number)
        # The next writer, though it fails, puts right what the crash left.
        with pytest.raises(ZeroDivisionError), new_folder(parent / "bundle", NOTE):
            _ = 1 / 0
        assert not parent.exists() or names(parent) in ([], ["bundle"])
        if (parent / "bundle").exists():
            assert names(parent / "bundle") == ["data", MANIFEST]
            found.add((parent / "bundle" / "data").read_text())
        else:
            found.add("nothing")
    assert found == ({"first", "second"} if before == "replace" else {"nothing", "second"})


def test_killed_in_the_block_leaves_what_the_next_write_removes(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    program = (
        "import os, sys; from test_bundle import NOTE, new_folder, Path\n"
        "with new_folder(Path(sys.argv[1]), NOTE) as temporary:\n"
        "    (temporary / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bundle")]
    killed = subprocess.run(command, cwd=Path(__file__).parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) > 1
    assert names(tmp_path / "bundle") == ["data", MANIFEST]
    make(tmp_path / "bundle", "second")
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / "data").read_text() == "second"


# ------------------------------------------------------------------------------------------------------ checking files


def test_sound_files_pass(tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    check_files(tmp_path / "bundle", file_records(tmp_path / "bundle", ["data", MANIFEST]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"firs", "expected 5 bytes, found 4"),
        (b"first!", "expected 5 bytes, found 6"),
        (b"First", "expected SHA-256 .*found .*altered"),
        (None, "data is missing"),
    ],
)
def test_an_altered_file_is_found(tmp_path: Path, content: bytes | None, message: str) -> None:
    make(tmp_path / "bundle")
    records = file_records(tmp_path / "bundle", ["data"])
    if content is None:
        (tmp_path / "bundle" / "data").unlink()
    else:
        (tmp_path / "bundle" / "data").write_bytes(content)
    with pytest.raises(BundleError, match=message) as raised:
        check_files(tmp_path / "bundle", records)
    assert str(tmp_path / "bundle") in str(raised.value)


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "ABSOLUTE", "link"])
def test_a_way_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "bundle")
    secret = tmp_path / "secret"
    secret.write_text("first")
    (tmp_path / "bundle" / "link").symlink_to(secret)
    name = str(secret) if name == "ABSOLUTE" else name
    honest = file_records(tmp_path, ["secret"])["secret"]
    with pytest.raises(BundleError, match="lies outside the folder"):
        check_files(tmp_path / "bundle", {name: honest})


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "loop"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "bundle")
    (tmp_path / "bundle" / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=r"(cannot be read|is missing|lies outside)"):
        check_files(tmp_path / "bundle", {name: FileRecord(size_bytes=0, sha256="")})


# --------------------------------------------------------------------------------------------------- reading documents


def test_a_document_reads_back(tmp_path: Path) -> None:
    note = Note(text="é", number=3, ratio=0.1)
    write_bytes(tmp_path / "sub" / "note.json", canonical_json(note.model_dump(mode="json")).encode())
    assert read_document(Note, tmp_path / "sub" / "note.json", "note", "make note") == note
    assert names(tmp_path / "sub") == ["note.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "x"', "cut short or altered, no JSON"),
        ("", "cut short or altered, no JSON"),
        ("[" * 100_000, "cut short or altered, no JSON"),
        ('{"text": "x", "ratio": NaN}', "cut short or altered, no JSON"),
        ("[]", "valid dictionary|object"),
        ('{"text": "x", "colour": 1}', "colour: unknown key"),
        ('{"number": 1}', "text: this key is required"),
        ('{"text": "x", "number": "1"}', "number: .*valid integer"),
        ('{"text": "x", "number": true}', "number: .*valid integer"),
        ('{"text": "x", "ratio": 1e999}', "ratio: .*finite"),
    ],
)
def test_a_bad_document_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "note.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=message) as raised:
        read_document(Note, path, "note", "make note")
    assert str(path) in str(raised.value)
    assert "make note" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_document_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(BundleError, match="cannot be read"):
        read_document(Note, tmp_path / "note.json", "note", "make note")


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_a_missing_document_names_the_command(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"holds no note.*make one with: make note"):
        read_document(Note, tmp_path / place / "note.json", "note", "make note")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "note.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot be written: (Is a directory|Not a directory)"):
        write_bytes(tmp_path / "note.json", b"text")
    assert names(tmp_path) == ["note.json"]
    assert names(tmp_path / "note.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' is there twice"),
        ('{"text": "\\u001b[31mred"}', "control characters in"),
        ('{"text": "gpj.\\u202e"}', "control characters in"),
        ('{"te\\u0007xt": "a"}', "control characters in"),
        ('{"text": "\\ud800"}', "no JSON"),
        ("[" * 100_000 + "]" * 100_000, "no JSON"),
        ('{"text":' * 100_000 + "1" + "}" * 100_000, "no JSON"),
        ('{"text": "a", "number": ' + "9" * 5000 + "}", "number|no JSON"),
    ],
)
def test_a_document_that_readers_could_differ_about_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "note.json").write_text(text)
    with pytest.raises(BundleError, match=message) as raised:
        read_document(Note, tmp_path / "note.json", "note", "make note")
    assert str(raised.value).isprintable()


def test_a_document_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    with path.open("wb") as file:
        file.truncate(bundle.LARGEST_DOCUMENT_BYTES + 1)
    with pytest.raises(BundleError, match="a file of at most 64 MiB"):
        read_document(Note, path, "note", "make note")


def test_a_pipe_in_a_document_s_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "note.json")
    with pytest.raises(BundleError, match="or no file"):
        read_document(Note, tmp_path / "note.json", "note", "make note")


@given(st.text())
def test_a_message_is_one_line_whatever_stands_in_it(text: str) -> None:
    shown = str(StorageError(f"{text} cannot be written"))
    assert not UNPRINTABLE.search(shown)
    shown.encode()
