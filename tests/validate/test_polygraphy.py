"""The polygraphy lines of docs/validation.md, run exactly as they stand there."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import Made

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"
LINES = [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    polygraphy ")]


@pytest.fixture(scope="module")
def folder(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the bundle stands where the page says."""
    folder = tmp_path_factory.mktemp("readme")
    mixed.copy(folder / "engines" / "digits")
    return folder


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    return subprocess.run(shlex.split(line), cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_there_are_lines() -> None:
    assert [line.split()[1] for line in LINES] == ["run", "inspect", "inspect"]


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split()[1:3]))
def test_a_line_of_the_page(line: str, folder: Path) -> None:
    answer = polygraphy(line, folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "hidden_states" in answer.stdout or "Passed: 2/2 iterations" in answer.stdout


def test_polygraphy_sees_a_fault(folder: Path) -> None:
    """The comparison is one: with another graph's outputs it fails."""
    answer = polygraphy(LINES[0].replace("cached-1.outputs", "cached-2.outputs"), folder)
    assert answer.returncode == 1
    assert "FAILED" in answer.stdout
