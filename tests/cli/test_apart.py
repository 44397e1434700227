"""No command puts what it makes into a checkpoint, a plan or a bundle, whether it reads them or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import Made, run_cli

from tc_deploy.plan import PLAN

CALIBRATE = ("--steps", 4, "--samples", 0, "--keep-counts", 0, 0)


def tree(folder: Path) -> list[tuple[str, bytes]]:
    return sorted(
        (str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    )


@pytest.fixture
def made(mixed: Made, tmp_path: Path, save_dit: Callable[..., Path]) -> Made:
    """A checkpoint, a plan of it and a bundle of one's own."""
    model = save_dit(tmp_path / "model", num_layers=1)
    assert run_cli("calibrate", model, "-o", tmp_path / "plan", *CALIBRATE).code == 0
    return Made(model=model, plan=tmp_path / "plan", bundle=mixed.copy(tmp_path / "bundle"))


def words_of(command: str, made: Made, output: Path) -> tuple[object, ...]:
    return {
        "calibrate": ("calibrate", made.model, "-o", output, *CALIBRATE),
        "plan": ("plan", made.model, "-o", output, "--steps", 8),
        "export": ("export", made.plan, "-o", output, "--no-check"),
        "report": ("report", made.plan, "-o", output / "x.html"),
        "validate": ("validate", made.bundle, "-o", output / "x.json"),
        "generate": ("generate", made.bundle, "-o", output / "x.safetensors", "--class-label", 1),
    }[command]


@pytest.mark.parametrize("place", ["plan", "bundle", "bundle/onnx"])
@pytest.mark.parametrize("command", ["calibrate", "plan", "export", "report", "validate", "generate"])
def test_nothing_is_made_inside_a_plan_or_a_bundle(made: Made, command: str, place: str) -> None:
    root = made.plan.parent
    before = tree(root)
    answer = run_cli(*words_of(command, made, root / place / "new"))
    assert answer.code == 8, answer.err
    # The nearest folder above that is ours, or that is read.
    assert f" lies in {root / place.partition('/')[0]}, which " in answer.error
    assert answer.error.endswith("; choose another output")
    assert tree(root) == before


@pytest.mark.parametrize("command", ["calibrate", "plan", "export", "report"])
@pytest.mark.parametrize("way", ["plain", "through a link"])
def test_nothing_is_made_inside_the_checkpoint(made: Made, command: str, way: str) -> None:
    root = made.plan.parent
    output = made.model / "calibration" / "x"
    if way == "through a link":
        (root / "also").symlink_to(made.model)
        output = root / "also" / "x"
    before = tree(root)
    answer = run_cli(*words_of(command, made, output))
    assert answer.code == 8, answer.err
    assert " lies in " in answer.error
    assert "model, which this command reads; choose another output" in answer.error
    assert tree(root) == before


def test_a_pipeline_s_folder_takes_no_bundle(made: Made, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    words = words_of("export", made, tmp_path / "pipeline" / "engines")
    answer = run_cli(*words, "--with-decoder", "--pipeline", tmp_path / "pipeline")
    assert f"lies in {tmp_path / 'pipeline'}, which this command reads" in answer.error


def test_somebody_s_own_documents_of_these_names_are_in_nobody_s_way(made: Made, tmp_path: Path) -> None:
    for name, text in (("manifest.json", '{"name": "a web app"}'), (PLAN, "[1]")):
        (tmp_path / name).write_text(text)
    answer = run_cli(*words_of("calibrate", made, tmp_path / "calibration" / "x"))
    assert answer.code == 0, answer.err
