"""A file of requests: each row gets the picture that it asks for, bad rows are named, a second run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Answer, MadeByCommands, run_cli
from PIL import Image

from tc_deploy.scale.rows import RESULTS

ROWS = [
    {"prompt": "7", "seed": 1},
    {"prompt": "3", "seed": 5, "n": 2},
    {"class_label": 7, "quality": "hd", "seed": 1},
    {"prompt": "4"},
    {"prompt": "2", "seed": 0, "output_format": "webp"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def alone(bundle: Path, label: int, seed: int, folder: Path, *words: object) -> np.ndarray[Any, Any]:
    """The picture that the other way of making one, batches of whole runs, comes to."""
    path = folder / f"alone-{label}-{seed}-{len(words)}.png"
    assert run_cli("generate", bundle, "--class-label", label, "--seed", seed, "-o", path, *words).code == 0
    return pixels(path)


def test_every_row_is_the_picture_that_it_asks_for(pixel: MadeByCommands, tmp_path: Path) -> None:
    file, folder = write(tmp_path / "requests.jsonl", ROWS), tmp_path / "out"
    answer = run_cli("generate", pixel.bundle, "--input", file, "--seed", 10, "-o", folder, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert (facts["made"], facts["skipped"], facts["failed"]) == (5, 0, [])
    expected = {
        "000001-1.png": (7, 1, []),
        "000002-5.png": (3, 5, []),
        "000002-6.png": (3, 6, []),
        "000003-1.png": (7, 1, ["--full"]),
        "000004-13.png": (4, 13, []),  # the fourth line of a run that began with seed 10
    }
    assert {path.name for path in folder.iterdir()} == {*expected, "000005-0.webp", RESULTS}
    for name, (label, seed, words) in expected.items():
        assert np.abs(pixels(folder / name) - alone(pixel.bundle, label, seed, tmp_path, *words)).max() <= 1
    lines = [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]
    assert {line["line"]: line["files"] for line in lines}[2] == ["000002-5.png", "000002-6.png"]


def test_a_bad_row_is_named_with_its_line_and_stops_no_other(pixel: MadeByCommands, tmp_path: Path) -> None:
    bad = ["{", '{"prompt": "70"}', '{"prompt": 7}', "[]", '{"nothing": 1}', '{"prompt": "7", "stream": true}']
    bad += ["x" * 70_000, '{"prompt": "\\ud800"}', '{"prompt": "7", "n": 0}', "\x00", '{"prompt": "7", "seed": -1}']
    file, folder = write(tmp_path / "r.jsonl", ["", ROWS[0], *bad, ROWS[3]]), tmp_path / "out"
    answer = run_cli("generate", pixel.bundle, "--input", file, "-o", folder)
    assert answer.code == 2
    assert f"{len(bad)} rows could not be made, the first is line 3: " in answer.error
    named = [line for line in answer.err.splitlines() if line.startswith(f"{file}:")]
    assert [int(line.removeprefix(f"{file}:").partition(":")[0]) for line in named] == [*range(3, 3 + len(bad))]
    assert {path.suffix for path in folder.iterdir()} == {".png", ".jsonl"}
    assert len(list(folder.glob("*.png"))) == 2


def test_a_run_goes_on_where_the_last_one_was(
    pixel: MadeByCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = write(tmp_path / "r.jsonl", ROWS), tmp_path / "out"

    def run() -> Any:
        answer = run_cli("generate", pixel.bundle, "--input", file, "-o", folder, "--json")
        assert answer.code == 0, answer.err
        facts = json.loads(answer.out)
        return facts["made"], facts["skipped"]

    assert run() == (5, 0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*g*")}
    assert run() == (0, 5)
    # One that was killed: a picture without its line, half a line.
    journal = folder / RESULTS
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:3]) + kept[3][:-20])
    assert run() == (2, 3)
    # A picture that is gone, a row that asks for something else now.
    (folder / "000001-1.png").unlink()
    write(file, [*ROWS[:3], {"prompt": "5"}, *ROWS[4:]])
    assert run() == (2, 3)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.*g*")}
    assert after["000002-5.png"] == before["000002-5.png"]
    assert np.abs(pixels(folder / "000004-3.png") - alone(pixel.bundle, 5, 3, tmp_path)).max() <= 1


def test_another_bundle_s_pictures_are_made_anew(
    pixel: MadeByCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = write(tmp_path / "r.jsonl", ROWS[:1]), tmp_path / "out"
    words = ("generate", pixel.bundle, "--input", file, "-o", folder)
    assert run_cli(*words).code == 0
    journal = folder / RESULTS
    journal.write_text(journal.read_text(encoding="utf-8").replace('"bundle": "', '"bundle": "other'), encoding="utf-8")
    assert "1 row made, 0 skipped" in run_cli(*words).out


def refused(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer.err
    for each in words:
        assert each in answer.error


def test_a_folder_that_is_somebody_s_is_left_alone(pixel: MadeByCommands, tmp_path: Path) -> None:
    file, folder = write(tmp_path / "r.jsonl", ROWS[:1]), tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's", encoding="utf-8")
    run: Callable[..., Answer] = lambda where: run_cli("generate", pixel.bundle, "--input", file, "-o", where)  # noqa: E731
    refused(run(folder), 8, "holds something else than results.jsonl")
    (folder / RESULTS).write_text('{"line": 1}\n', encoding="utf-8")
    refused(run(folder), 8, f"{folder / RESULTS}:1 is no line that tc-deploy wrote")
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "somebody's"
    refused(run(pixel.bundle / "out"), 8, "lies in")
    refused(run(file), 8, "which this command reads")
    refused(run(folder / "notes.txt"), 8, "cannot be written")
    # A line that leads elsewhere.
    line = {"line": 1, "files": ["../notes.txt"], "made_by": "tc-deploy 0"}
    (folder / RESULTS).write_text(json.dumps(line) + "\n", encoding="utf-8")
    refused(run(folder), 8, "is no line that tc-deploy wrote")


def test_two_at_a_time_do_not_write_one_folder(pixel: MadeByCommands, tmp_path: Path) -> None:
    from tc_deploy.scale.rows import results_in

    file = write(tmp_path / "r.jsonl", ROWS[:1])
    with results_in(tmp_path / "out", "x", reads=[]):
        answer = run_cli("generate", pixel.bundle, "--input", file, "-o", tmp_path / "out")
    refused(answer, 8, "another process writes it")


def test_mistakes_are_said_before_an_engine_is_loaded(
    pixel: MadeByCommands, mixed: MadeByCommands, tmp_path: Path
) -> None:
    file = write(tmp_path / "r.jsonl", ROWS[:1])
    words = ("-o", tmp_path / "out", "--input")
    refused(run_cli("generate", pixel.bundle, *words, tmp_path / "no"), 2, "no such file")
    refused(run_cli("generate", pixel.bundle, *words, tmp_path), 2, "a folder, and no file")
    refused(run_cli("generate", pixel.bundle, *words, write(tmp_path / "e.jsonl", ["", " "])), 2, "holds no row")
    refused(run_cli("generate", mixed.bundle, *words, file), 2, "makes latents, no pictures")
    refused(run_cli("generate", pixel.bundle, *words, file, "--seed", 2**60), 2, "--seed must be at most")
    for extra in (["--class-label", 1], ["--guidance-scale", 0], ["--full"], ["-n", 1], ["--zoom", 2]):
        refused(run_cli("generate", pixel.bundle, *words, file, *extra), 2, f"{extra[0]} does not go with --input")
    for extra in (["--ray"], ["--workers", 2]):
        answer = run_cli("generate", pixel.bundle, "--class-label", 1, "-o", tmp_path / "x.png", *extra)
        refused(answer, 2, "--ray with --input")
    assert not (tmp_path / "out").exists()
