"""Where a plan's checkpoint and prompts are found again: from any folder, after a move, or said to be gone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo
from bundles import recipe_of, run_cli
from safetensors.numpy import save_file

import tc_deploy
from tc_deploy.errors import INTERNAL_EXIT_CODE, ModelError
from tc_deploy.models.hub import local_folder
from tc_deploy.plan import PromptsRecord, load_plan

WORDS = ("--steps", 4, "--samples", 0, "--keep-counts", 0, 0)


@pytest.fixture
def project(tmp_path: Path, save_dit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint two names below it, as an id of the hub is written."""
    folder = tmp_path / "project"
    save_dit(folder / "models" / "dit", num_layers=1)
    monkeypatch.chdir(folder)
    return folder


def source_of(plan: Path) -> str:
    return str(json.loads((plan / "plan.json").read_text())["model"]["source"])


def test_a_plan_is_exported_from_any_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("calibrate", "models/dit", "-o", "calibration/x", *WORDS).code == 0
    assert source_of(project / "calibration" / "x") == "../../models/dit"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    answer = run_cli("export", project / "calibration" / "x", "-o", "deep/er/bundle", "--no-check")
    assert answer.code == 0, answer.err
    # A bundle's copy of the plan names the same checkpoint; the two lie in no common project.
    assert source_of(elsewhere / "deep" / "er" / "bundle") == str(project / "models" / "dit")
    monkeypatch.chdir(project)
    answer = run_cli("export", "calibration/x", "-o", "engines/deep/x", "--no-check")
    assert answer.code == 0, answer.err
    assert source_of(project / "engines" / "deep" / "x") == "../../../models/dit"
    assert load_plan(project / "engines" / "deep" / "x")[0].model.source == str(project / "models" / "dit")


def test_checkpoint_and_plan_move_together(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("calibrate", "./models/dit", "-o", "calibration/x", *WORDS).code == 0
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    answer = run_cli("export", "moved/calibration/x", "-o", "bundle", "--no-check")
    assert answer.code == 0, answer.err


def test_a_checkpoint_that_is_gone_is_asked_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("calibrate", "models/dit", "-o", "calibration/x", *WORDS).code == 0
    kept = shutil.move(project / "models", project.parent / "kept")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    answer = run_cli("export", "calibration/x", "-o", "bundle")
    assert answer.code == ModelError.exit_code
    assert f"the checkpoint {project / 'models' / 'dit'}, which is not there" in answer.error
    assert answer.error.endswith("--model")
    answer = run_cli("export", "calibration/x", "-o", "bundle", "--no-check", "--model", Path(kept) / "dit")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    "path", ["./models/other", "../project/other", "models/other", "/models/other", "a/b/c", "owner/dit.safetensors"]
)
def test_what_reads_like_a_place_never_goes_to_the_hub(
    project: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for words in (("calibrate", path), ("plan", path)):
        answer = run_cli(*words, "-o", "calibration/x")
        assert answer.code == ModelError.exit_code
        assert "no such folder" in answer.error
    Path("recipe.toml").write_text(f'model = "{path}"\n')
    assert "no such folder" in run_cli("calibrate", "recipe.toml", "-o", "calibration/x").error
    assert project


def test_an_id_goes_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(repository: str, **_: object) -> str:
        asked.append(repository)
        return str(project / "models" / "dit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert local_folder(Path("owner/dit")) == project / "models" / "dit"
    assert run_cli("calibrate", "owner/dit", "-o", "calibration/x", *WORDS).code == 0
    assert source_of(project / "calibration" / "x") == "owner/dit"
    assert {*asked} == {"owner/dit"}


def test_a_plan_s_prompts_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    model = zoo.model("pixart")
    zoo.save("pixart", folder / "model")
    shutil.copytree(scheduler_of(tmp_path), folder / "model" / "scheduler")
    import torch

    given = model.random_conditions(2, torch.Generator().manual_seed(0))
    save_file({name: tensor.numpy() for name, tensor in given.items()}, folder / "prompts.safetensors")
    monkeypatch.chdir(folder)
    recipe = recipe_of(folder, folder / "model", latent_size=[8, 12], text_tokens=5)
    answer = run_cli("calibrate", recipe, "-o", "calibration/x", *WORDS, "--conditions", "prompts.safetensors")
    assert answer.code == 0, answer.err
    document = json.loads((folder / "calibration" / "x" / "plan.json").read_text())
    assert document["origin"]["conditions"]["file"] == "../../prompts.safetensors"
    monkeypatch.chdir(tmp_path)
    found = load_plan(folder / "calibration" / "x")[0].origin.conditions
    assert isinstance(found, PromptsRecord)
    assert found.file == str(folder / "prompts.safetensors")


def scheduler_of(folder: Path) -> Path:
    import diffusers

    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    return folder / "scheduler"


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "loop"),
        ("serve", "loop"),
        ("serve", "engines/loop"),
        ("export-triton", "loop", "-o", "made"),
        ("generate", "loop", "-o", "made.png"),
        ("build", "loop"),
        ("validate", "loop"),
        ("export", "loop", "-o", "made"),
        ("calibrate", "loop", "-o", "made"),
    ],
    ids=" ".join,
)
def test_a_link_to_itself_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("engines").mkdir()
    Path("engines/loop").symlink_to("loop")
    answer = run_cli(*words)
    assert answer.code not in (0, INTERNAL_EXIT_CODE), answer.err
    assert "loop" in answer.err
    assert not Path("made").exists()


def test_links_are_followed_in_one_way() -> None:
    """``Path.resolve`` raises a RuntimeError for links in a circle before Python 3.13; ``real_path`` does not."""
    package = Path(tc_deploy.__file__).parent
    found = [str(file) for file in package.rglob("*.py") if re.search(r"\.resolve\(", file.read_text())]
    assert found == []
