"""The way from a checkpoint to validated engines in one command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from bundles import Made, SaveDit, run_cli

from tc_deploy.errors import UsageError
from tc_deploy.manifest import ONNX_FOLDER, read_manifest
from tc_deploy.plan import load_plan


def test_deploy_runs_the_commands_that_it_shows(
    save_dit: SaveDit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_dit(tmp_path / "models" / "dit", num_layers=1)
    words = ("--steps", 6, "--cache-interval-early", 3, "--cache-interval-late", 3, "--skip", "blocks", "--samples", 2)
    answer = run_cli("-q", "deploy", model, *words, "-o", "engines/tiny")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "PASSED"
    shown = [shlex.split(line.removeprefix("$ ")) for line in answer.out.splitlines() if line.startswith("$ ")]
    # The order in which options are declared, not given; each command stands as it would be typed.
    assert shown[1:] == [
        ["tc-deploy", "export", "calibration/tiny", "-o", "engines/tiny"],
        ["tc-deploy", "build", "engines/tiny"],
        ["tc-deploy", "validate", "engines/tiny"],
    ]
    program, name, *calibrates = shown[0]
    assert (program, name, calibrates[0], calibrates[-2:]) == (
        "tc-deploy",
        "calibrate",
        str(model),
        ["-o", "calibration/tiny"],
    )
    assert load_plan(Path("calibration/tiny"))[0].run_schedule().line() == "F c1 c1 | F c2 c2"
    first = Path("calibration/tiny/plan.json").read_bytes()
    assert run_cli("-q", name, *calibrates).code == 0
    assert Path("calibration/tiny/plan.json").read_bytes() == first
    # Both phases keep the same, so one graph serves them; validate compared it for both.
    manifest = read_manifest(Path("engines/tiny"))
    assert {manifest.graphs[name].file for name in ("cached-1", "cached-2")} == {f"{ONNX_FOLDER}/cached-1.onnx"}
    assert not (Path("engines/tiny") / ONNX_FOLDER / "cached-2.onnx").exists()


def test_a_plan_takes_no_settings_of_calibration(mixed: Made, tmp_path: Path) -> None:
    for words, named in ((("--steps", 4), "--steps"), (("--plan", tmp_path / "x"), "--plan")):
        answer = run_cli("deploy", mixed.plan, *words, "-o", tmp_path / "bundle")
        assert answer.code == UsageError.exit_code
        assert f"is a plan already, so {named} changes nothing; leave it out" in answer.error
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_ends_it(tiny_dit_folder: Path, tmp_path: Path) -> None:
    words = ("--prompt", "a cat", "--plan", tmp_path / "plan")
    answer = run_cli("-q", "deploy", tiny_dit_folder, *words, "-o", tmp_path / "bundle")
    assert answer.code == UsageError.exit_code
    assert "takes class labels" in answer.error
    assert answer.out.count("$ tc-deploy") == 1
    assert list(tmp_path.iterdir()) == []
