"""Options from a file: they are what is typed, and what is typed stands above them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import Made, run_cli, snapshot


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_what_is_typed_and_what_is_typed_stands_above_it(mixed: Made, tmp_path: Path) -> None:
    file = written(
        tmp_path / "build.toml", 'backend = "onnxruntime"\nthreads = 2\nweights = "packed"\nunfused = true\n'
    )
    bundles = {name: mixed.copy(tmp_path / name) for name in ("file", "words", "both")}
    words = ("--threads", 2, "--weights", "packed", "--unfused")
    said = {
        "file": run_cli("build", bundles["file"], "--config", file),
        "words": run_cli("build", bundles["words"], *words),
        "both": run_cli("build", bundles["both"], "--threads", 1, "--config", file),
    }
    assert {name: answer.code for name, answer in said.items()} == dict.fromkeys(said, 0), said
    assert snapshot(bundles["file"]) == snapshot(bundles["words"])
    options = json.loads((bundles["both"] / "onnxruntime" / "manifest.json").read_text(encoding="utf-8"))["options"]
    assert (options["threads"], options["weights"], options["unfused"]) == (1, "packed", True)


def test_an_export_finds_what_lies_beside_the_file(
    mixed: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'output = "../bundles/x"\nprecision = "fp16"\nmodel = "no-model"\nfp32_block = ["transformer_blocks.0"]\n'
    answer = run_cli("export", mixed.plan, "--config", written(tmp_path / "recipes" / "export.toml", text))
    assert answer.code == 3
    assert "recipes/no-model" in answer.error
    text = text.replace('"no-model"', json.dumps(str(mixed.model))).replace("blocks.0", "blocks.9")
    answer = run_cli("export", mixed.plan, "--config", written(tmp_path / "recipes" / "export.toml", text))
    assert "transformer_blocks.9" in answer.error
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "thread = 2",
            "thread: unknown key; known here: backend, batch_profile, compile, compute_capability, device, ",
        ),
        ("[threads]\nx = 1", "threads: expected a text or a number, found {'x': 1}"),
        ("threads = [1, 2]", "threads: expected a text or a number, found [1, 2]"),
        ("threads = true", "threads: expected a text or a number, found True"),
        ('threads = "many"', "threads: 'many' is not a valid integer range."),
        ("unfused = 1", "unfused: expected true or false, found 1"),
        ("batch_profile = 4", "batch_profile: expected a list of texts or numbers, found 4"),
        ("batch_profile = [1, 2]", "batch_profile: "),
        ("json = true", "json: unknown key; "),
        ("threads = ", "not a TOML file: "),
    ],
)
def test_what_no_option_takes_is_refused_with_the_file(mixed: Made, tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path / "build.toml", text)
    answer = run_cli("build", mixed.bundle, "--config", file)
    assert answer.code == 2
    assert answer.error.startswith(f"error: {file}: {message}")


def test_a_file_that_is_not_there(mixed: Made, tmp_path: Path) -> None:
    answer = run_cli("build", mixed.bundle, "--config", tmp_path / "none.toml")
    assert (answer.code, answer.error) == (2, f"error: {tmp_path / 'none.toml'}: no such recipe")
