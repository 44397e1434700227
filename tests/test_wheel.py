"""The wheel by itself: in an empty environment, away from the clone, it runs a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import Made

import tc_deploy

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a stranger's machine would: nothing of this environment is seen."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(word) for word in words], cwd=cwd, env=kept, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and its extra ``cpu``, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    made = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, cwd=folder)
    if made.returncode:
        pytest.skip(f"needs a package index, for hatchling: {made.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("tc_deploy-*.whl")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    made = run(folder / "venv/bin/pip", "install", "-c", CONSTRAINTS, f"{wheel}[cpu]", cwd=folder)
    if made.returncode:
        pytest.skip(f"needs a package index, for what the wheel requires: {made.stderr.strip().splitlines()[-1]}")
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_a_wheel_runs_a_bundle(environment: Path, multistep: Made, tmp_path: Path) -> None:
    answer = run(environment / "tc-deploy", "--version", cwd=tmp_path)
    assert answer.stdout.startswith("tc-deploy 0.")
    bundle = multistep.copy(tmp_path / "bundle")
    words = ("generate", bundle, "--class-label", 3, "--seed", 5, "-o", "x.npy")
    answer = run(environment / "tc-deploy", *words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    with tc_deploy.load(multistep.bundle, batch_size=1) as pipeline:
        expected = pipeline(class_labels=[3], seed=5).latents
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    packages = run(environment / "pip", "list", "--format", "freeze", cwd=tmp_path).stdout
    assert "torch" not in packages
    assert "diffusers" not in packages


@pytest.mark.slow
def test_what_a_wheel_lacks_is_named_by_commands_that_work_there(environment: Path, tmp_path: Path) -> None:
    """No extra of a clone, and no file that only a clone has."""
    answer = run(environment / "tc-deploy", "calibrate", tmp_path, "-o", "plan", cwd=tmp_path)
    assert answer.returncode == 7
    assert "is not installed: pip install '" in answer.stderr
    assert "'.[" not in answer.stderr
    doctor = run(environment / "tc-deploy", "doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout
    assert "'.[" not in doctor.stdout
