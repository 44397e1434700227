"""What this machine can run, and why not the rest.

In: the machine. Out: a :class:`Report`. Never: imports torch, changes anything, or guesses: what was not tried says so.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tc_deploy import __version__
from tc_deploy.errors import first_line
from tc_deploy.hardware import Gpu, cpu_and_features, memory_mib, nvidia_gpus, usable_cores
from tc_deploy.libraries import EXTRA_BY_MODULE, install_command, is_missing, keep_silent

COMPILE_DISTRIBUTIONS = (
    "torch",
    "torchmetrics",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnx-ir",
    "onnxscript",
)
ONNXRUNTIME_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
)
"""Distributions that all install the one module ``onnxruntime``."""
CUDA_PROVIDER = "CUDAExecutionProvider"

TENSORRT_ENGINES = {"TensorRT": "tensorrt", "TensorRT-RTX": "tensorrt_rtx"}
"""Engines that run on an NVIDIA GPU, with the distribution that brings each."""

_NEGATION = (
    b'\x08\t:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)
"""An ONNX model of one node, y = -x, so that an engine can be tried where onnx is not installed."""


class Status(StrEnum):
    """Whether a stage can run here."""

    OK = "ok"
    MISSING = "missing"
    """Something must be installed."""
    BROKEN = "broken"
    """It is installed and does not work."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing that tc-deploy does, and whether this machine can."""

    name: str
    status: Status
    detail: str
    cure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found out about the machine, before any judgement."""

    python: str
    system: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_mib: int | None
    gpus: tuple[Gpu, ...]
    gpu_note: str
    """Why ``gpus`` is empty; empty itself where it is not."""
    versions: Mapping[str, str]
    """Versions of the installed distributions that matter here, by name."""
    providers: tuple[str, ...]
    """What onnxruntime says it was built with; empty where it does not import."""
    onnxruntime_error: str | None
    """Why onnxruntime does not work; None where it works or is not installed."""
    openvino_precisions: tuple[str, ...]
    """What openvino can compute in on this CPU; empty where it does not work or is not installed."""
    openvino_error: str | None
    """As for onnxruntime."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The judgement on the facts."""

    tc_deploy: str
    facts: Facts
    stages: tuple[Stage, ...]
    problems: tuple[str, ...]
    """What is installed wrongly, each with its cure."""
    can_run: bool
    """Whether the default path, ONNX Runtime on the CPU, can run here."""


def examine() -> Report:
    """Look at this machine and judge it."""
    return report_from_facts(gather_facts())


def report_from_facts(facts: Facts) -> Report:
    """Judge what was found; a pure function."""
    cpu = _cpu_stage(facts)
    stages = (_compile_stage(facts), cpu, _openvino_stage(facts), _cuda_stage(facts), *_tensorrt_stages(facts))
    return Report(
        tc_deploy=__version__,
        facts=facts,
        stages=stages,
        problems=_problems(facts),
        can_run=cpu.status is Status.OK,
    )


def _compile_stage(facts: Facts) -> Stage:
    name = "calibrate, export (PyTorch)"
    missing = [distribution for distribution in COMPILE_DISTRIBUTIONS if distribution not in facts.versions]
    if missing:
        cure = f"{install_command('compile')}; not needed to build and run engines from exported graphs"
        return Stage(name=name, status=Status.MISSING, detail=f"not installed: {', '.join(missing)}", cure=cure)
    return Stage(name=name, status=Status.OK, detail=_versions_line(facts, COMPILE_DISTRIBUTIONS))


def _installed_onnxruntimes(facts: Facts) -> list[str]:
    return [distribution for distribution in ONNXRUNTIME_DISTRIBUTIONS if distribution in facts.versions]


def _cpu_stage(facts: Facts) -> Stage:
    name = "build, run (ONNX Runtime, CPU)"
    installed = _installed_onnxruntimes(facts)
    if facts.onnxruntime_error is not None:
        cure = f"pip uninstall -y {' '.join(installed or ['onnxruntime'])}; then {install_command('cpu')}"
        return Stage(name=name, status=Status.BROKEN, detail=facts.onnxruntime_error, cure=cure)
    if not installed:
        detail = "onnxruntime is not installed"
        return Stage(name=name, status=Status.MISSING, detail=detail, cure=install_command("cpu"))
    if "CPUExecutionProvider" not in facts.providers:
        detail = f"onnxruntime has no CPUExecutionProvider, only: {', '.join(facts.providers) or 'none'}"
        return Stage(name=name, status=Status.BROKEN, detail=detail, cure="install a stock build of onnxruntime")
    return Stage(name=name, status=Status.OK, detail=_versions_line(facts, installed) + "; ran a one-node graph")


def _openvino_stage(facts: Facts) -> Stage:
    name, cure = "build, run (OpenVINO, CPU)", install_command("openvino")
    if facts.openvino_error is not None:
        cure = f"pip uninstall -y openvino; then {cure}"
        return Stage(name=name, status=Status.BROKEN, detail=facts.openvino_error, cure=cure)
    if "openvino" not in facts.versions:
        return Stage(name=name, status=Status.MISSING, detail="openvino is not installed", cure=cure)
    detail = f"{_versions_line(facts, ['openvino'])}; ran a one-node graph"
    return Stage(name=name, status=Status.OK, detail=f"{detail}, computes in {', '.join(facts.openvino_precisions)}")


def _cuda_stage(facts: Facts) -> Stage:
    name = "build, run (ONNX Runtime, CUDA)"
    if CUDA_PROVIDER not in facts.providers:
        cure = f"pip uninstall -y onnxruntime; then {install_command('cuda')}"
        return Stage(name=name, status=Status.MISSING, detail=f"onnxruntime has no {CUDA_PROVIDER} here", cure=cure)
    installed = _versions_line(facts, _installed_onnxruntimes(facts))
    if not facts.gpus:
        detail = f"{installed}; needs an NVIDIA GPU: {facts.gpu_note}"
        return Stage(name=name, status=Status.MISSING, detail=detail)
    return Stage(name=name, status=Status.OK, detail=f"{installed}; {facts.gpus[0].name} was not tried")


def _tensorrt_stages(facts: Facts) -> list[Stage]:
    stages = []
    for engine, distribution in TENSORRT_ENGINES.items():
        name = f"build, run ({engine})"
        if distribution not in facts.versions:
            cure = install_command(EXTRA_BY_MODULE[distribution])
            stages.append(Stage(name=name, status=Status.MISSING, detail=f"{distribution} is not installed", cure=cure))
            continue
        installed = _versions_line(facts, [distribution])
        builds = distribution == "tensorrt_rtx"
        if facts.gpus:
            detail = f"{installed}; {facts.gpus[0].name} was not tried"
        elif builds:
            detail = f"{installed}; builds here, runs on a machine with an NVIDIA GPU: {facts.gpu_note}"
        else:
            detail = f"{installed}; needs an NVIDIA GPU: {facts.gpu_note}"
        stages.append(Stage(name=name, status=Status.OK if facts.gpus or builds else Status.MISSING, detail=detail))
    return stages


def _problems(facts: Facts) -> tuple[str, ...]:
    installed = _installed_onnxruntimes(facts)
    if len(installed) < 2:
        return ()
    problem = (
        f"{' and '.join(installed)} are installed together and overwrite each other's files; removing one breaks the"
        f" other. Remove all, then install one: pip uninstall -y {' '.join(installed)}; {install_command('cpu')}"
    )
    return (problem,)


def _versions_line(facts: Facts, distributions: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{distribution} {facts.versions[distribution]}" for distribution in distributions)


def gather_facts() -> Facts:
    """Look at this machine."""
    cpu, cpu_features = cpu_and_features()
    gpus, gpu_note = nvidia_gpus()
    engines = ("openvino", *TENSORRT_ENGINES.values())
    versions = _versions((*COMPILE_DISTRIBUTIONS, *ONNXRUNTIME_DISTRIBUTIONS, *engines))
    providers, onnxruntime_error = _try_onnxruntime()
    openvino_precisions, openvino_error = _try_openvino()
    return Facts(
        python=platform.python_version(),
        system=platform.platform(),
        cpu=cpu,
        cpu_features=cpu_features,
        cores=usable_cores(),
        memory_mib=memory_mib(),
        gpus=gpus,
        gpu_note=gpu_note,
        versions=versions,
        providers=providers,
        onnxruntime_error=onnxruntime_error,
        openvino_precisions=openvino_precisions,
        openvino_error=openvino_error,
    )


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[distribution] = importlib.metadata.version(distribution)
    return versions


def _try_onnxruntime() -> tuple[tuple[str, ...], str | None]:
    """The providers that onnxruntime offers, and what is wrong with it."""
    try:
        import numpy as np
        import onnxruntime

        providers = tuple(onnxruntime.get_available_providers())
        session = onnxruntime.InferenceSession(_NEGATION, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": np.ones(1, dtype=np.float32)})
    except Exception as error:  # noqa: BLE001 - a half-deleted installation fails in ways that nobody can list
        return (), _what_is_wrong("onnxruntime", error)
    return providers, None if y.tolist() == [-1.0] else f"onnxruntime computes wrongly: -1 came out as {y.tolist()}"


def _try_openvino() -> tuple[tuple[str, ...], str | None]:
    """The precisions that openvino offers, and what is wrong with it."""
    try:
        keep_silent("openvino")
        import numpy as np
        import openvino

        from tc_deploy.backends.openvino.run import precisions_of

        core = openvino.Core()
        compiled = core.compile_model(core.read_model(_NEGATION), "CPU")
        y = compiled({"x": np.ones(1, dtype=np.float32)})["y"]
        precisions = precisions_of(core)
    except Exception as error:  # noqa: BLE001 - as in _try_onnxruntime
        return (), _what_is_wrong("openvino", error)
    return precisions, None if y.tolist() == [-1.0] else f"openvino computes wrongly: -1 came out as {y.tolist()}"


def _what_is_wrong(library: str, error: Exception) -> str | None:
    """Why a library does not work; None where it is not there."""
    if is_missing(library, error):
        return None
    verb = "work" if library in sys.modules else "load"
    return f"{library} is installed but does not {verb}: {type(error).__name__}: {first_line(error)}"
