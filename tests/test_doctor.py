"""The doctor: its judgement on facts, and what it finds on a machine that the test makes up."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tc_deploy.backends import registry
from tc_deploy.doctor import (
    COMPILE_DISTRIBUTIONS,
    Facts,
    Gpu,
    Report,
    Stage,
    Status,
    gather_facts,
    report_from_facts,
)
from tc_deploy.errors import BackendError
from tc_deploy.libraries import install_command

ROOT = Path(__file__).parents[1]
GPU = Gpu(name="NVIDIA Test, 2nd", driver="600.1", memory_mib=81559, compute_capability="9.0")
SOUND = Facts(
    python="3.11.7",
    system="Linux",
    cpu="Test CPU",
    cpu_features=("avx2",),
    cores=2,
    memory_mib=1024,
    gpus=(),
    gpu_note="no NVIDIA driver found",
    versions={"onnxruntime": "1.22", **dict.fromkeys(COMPILE_DISTRIBUTIONS, "1.0")},
    providers=("CPUExecutionProvider",),
    onnxruntime_error=None,
    openvino_precisions=(),
    openvino_error=None,
)


def judge(**changes: Any) -> Report:
    return report_from_facts(dataclasses.replace(SOUND, **changes))


def stage(report: Report, part: str) -> Stage:
    (found,) = (stage for stage in report.stages if part in stage.name)
    return found


def doctor(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, with ``path`` before everything that Python and the shell look through."""
    before = "" if path is None else f"sys.path.insert(0, {str(path)!r}); os.environ['PATH'] = {str(path)!r}; "
    program = f"import os, sys; {before}from tc_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


WRONG_ONNXRUNTIME = """
import numpy
get_available_providers = lambda: ["CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): pass
    def run(self, outputs, inputs): return [numpy.zeros(1)]
"""

# ----------------------------------------------------------------------------------------------------------- judgement


def test_a_sound_machine() -> None:
    report = judge()
    assert report.can_run
    assert report.problems == ()
    assert stage(report, "calibrate").status is Status.OK
    assert stage(report, "ONNX Runtime, CPU").status is Status.OK
    assert "onnxruntime 1.22" in stage(report, "ONNX Runtime, CPU").detail


def test_a_machine_that_only_runs_engines() -> None:
    report = judge(versions={"onnxruntime": "1.22", "torch": "2.9"})
    assert report.can_run
    compiling = stage(report, "calibrate")
    assert compiling.status is Status.MISSING
    assert "diffusers" in compiling.detail
    assert "torch" not in compiling.detail.removeprefix("not installed: ").split(", ")
    assert "'torch>=" in str(compiling.cure)


def test_no_onnxruntime() -> None:
    report = judge(versions={}, providers=())
    assert not report.can_run
    assert stage(report, "ONNX Runtime, CPU").status is Status.MISSING
    assert "'onnxruntime>=" in str(stage(report, "ONNX Runtime, CPU").cure)


def test_an_onnxruntime_that_does_not_work() -> None:
    report = judge(onnxruntime_error="it fell over", providers=())
    assert not report.can_run
    assert stage(report, "ONNX Runtime, CPU").status is Status.BROKEN
    assert stage(report, "ONNX Runtime, CPU").detail == "it fell over"
    assert "pip uninstall -y onnxruntime;" in str(stage(report, "ONNX Runtime, CPU").cure)


def test_an_onnxruntime_without_its_cpu_provider() -> None:
    report = judge(providers=("OtherExecutionProvider",))
    assert not report.can_run
    assert "OtherExecutionProvider" in stage(report, "ONNX Runtime, CPU").detail


def test_an_openvino_that_works_says_what_it_computes_in() -> None:
    report = judge(versions={**SOUND.versions, "openvino": "2026.4"}, openvino_precisions=("f32", "bf16"))
    assert stage(report, "OpenVINO").status is Status.OK
    assert stage(report, "OpenVINO").detail == "openvino 2026.4; ran a one-node graph, computes in f32, bf16"


def test_an_openvino_that_is_missing_or_broken_leaves_the_default_path() -> None:
    for changes, status in (({}, Status.MISSING), ({"openvino_error": "it fell over"}, Status.BROKEN)):
        report = judge(**changes)
        assert report.can_run
        assert stage(report, "OpenVINO").status is status
        assert "'openvino>=" in str(stage(report, "OpenVINO").cure)


def test_two_onnxruntimes_are_a_problem_even_while_they_work() -> None:
    report = judge(versions={"onnxruntime": "1.32", "onnxruntime-gpu": "1.31"})
    assert report.can_run
    (problem,) = report.problems
    assert "onnxruntime and onnxruntime-gpu" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'onnxruntime>=" in problem


def test_cuda_needs_its_provider_and_a_gpu() -> None:
    engine, gpu_build = "(ONNX Runtime, CUDA)", {"onnxruntime-gpu": "9.9"}
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    without = stage(judge(gpus=(GPU,)), engine)
    assert without.status is Status.MISSING
    assert "has no CUDAExecutionProvider" in without.detail
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]>=" in str(without.cure)
    assert stage(judge(versions=gpu_build, providers=providers), engine).status is Status.MISSING
    usable = stage(judge(versions=gpu_build, providers=providers, gpus=(GPU,)), engine)
    assert usable.status is Status.OK
    assert usable.detail == f"onnxruntime-gpu 9.9; {GPU.name} was not tried"


@pytest.mark.parametrize(
    ("engine", "distribution", "extra", "status"),
    [("(TensorRT)", "tensorrt", "tensorrt", Status.MISSING), ("(TensorRT-RTX)", "tensorrt_rtx", "rtx", Status.OK)],
)
def test_tensorrt_runs_on_a_gpu_and_rtx_builds_without_one(
    engine: str, distribution: str, extra: str, status: Status
) -> None:
    assert stage(judge(), engine).status is Status.MISSING
    assert stage(judge(), engine).cure == install_command(extra)
    versions = {**SOUND.versions, distribution: "9.9"}
    without = stage(judge(versions=versions), engine)
    assert without.status is status
    assert "NVIDIA GPU: no NVIDIA driver found" in without.detail
    with_gpu = stage(judge(versions=versions, gpus=(GPU,), gpu_note=""), engine)
    assert with_gpu.status is Status.OK
    assert with_gpu.detail == f"{distribution} 9.9; NVIDIA Test, 2nd was not tried"


def test_every_backend_has_its_stage() -> None:
    # A new backend fails here until the doctor tries it; torch has the stage of calibration and export.
    assert set(registry.BACKENDS) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch"}


# ------------------------------------------------------------------------------------------------------- this machine


def test_what_it_finds_here() -> None:
    facts = gather_facts()
    assert facts.onnxruntime_error is None
    assert "CPUExecutionProvider" in facts.providers
    assert facts.openvino_error is None
    assert "f32" in facts.openvino_precisions
    assert facts.cores >= 1
    assert bool(facts.gpus) != bool(facts.gpu_note)


def test_the_command_as_lines() -> None:
    answer = doctor()
    assert answer.returncode == 0
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("tc-deploy: ")
    assert any(line.startswith("ok: build, run (ONNX Runtime, CPU)") for line in lines)
    assert answer.stdout.isascii()
    assert "\x1b" not in answer.stdout


def test_the_command_as_json() -> None:
    answer = doctor("--json")
    report = json.loads(answer.stdout)
    assert report["can_run"] is True
    assert report["facts"]["cores"] >= 1
    assert {"name", "status", "detail", "cure"} == set(report["stages"][0])


def test_it_imports_no_torch() -> None:
    program = "import sys; from tc_deploy.doctor import examine; examine(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# --------------------------------------------------------------------------------------------------- machines made up


def test_no_driver(tmp_path: Path) -> None:
    facts = json.loads(doctor("--json", path=tmp_path).stdout)["facts"]
    if not Path("/proc/driver/nvidia/version").exists():
        assert facts["gpu_note"] == "no NVIDIA driver found"
    assert facts["gpus"] == []


@pytest.mark.parametrize(
    ("script", "gpus", "note"),
    [
        (
            'echo "NVIDIA Test, 2nd, 600.1, 81559, 9.0"; echo "Small, 600.1, [N/A], 7.5"',
            [
                dataclasses.asdict(GPU),
                {"name": "Small", "driver": "600.1", "memory_mib": None, "compute_capability": "7.5"},
            ],
            "",
        ),
        ("echo No devices were found", [], "the NVIDIA driver found no GPU"),
        ('echo "driver/library version mismatch"; exit 18', [], "nvidia-smi failed: driver/library version mismatch"),
        ("exit 9", [], "nvidia-smi failed: exit code 9"),
    ],
)
def test_what_nvidia_smi_says(tmp_path: Path, script: str, gpus: list[dict[str, Any]], note: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    facts = json.loads(doctor("--json", path=tmp_path).stdout)["facts"]
    assert facts["gpus"] == gpus
    assert facts["gpu_note"] == note


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "AttributeError"),
        ("raise ImportError('libcublas is missing')", "ImportError: libcublas is missing"),
        ("import a_library_that_is_not_there", "a_library_that_is_not_there"),
        (WRONG_ONNXRUNTIME, "computes wrongly"),
    ],
)
def test_a_broken_onnxruntime(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "onnxruntime.py").write_text(source)
    answer = doctor(path=tmp_path)
    assert answer.returncode == BackendError.exit_code
    assert answer.stderr == ""
    (line,) = (line for line in answer.stdout.splitlines() if line.startswith("broken: build, run (ONNX Runtime, CPU)"))
    assert message in line


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "AttributeError"),
        ("import a_library_that_is_not_there", "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"),
    ],
)
def test_a_broken_openvino(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "openvino.py").write_text(source)
    answer = doctor(path=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    (line,) = (line for line in answer.stdout.splitlines() if line.startswith("broken: build, run (OpenVINO, CPU)"))
    assert message in line


def test_two_onnxruntimes_installed(tmp_path: Path) -> None:
    metadata = tmp_path / "onnxruntime_gpu-1.31.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    answer = doctor(path=tmp_path)
    assert "problem: onnxruntime and onnxruntime-gpu are installed together" in answer.stdout
