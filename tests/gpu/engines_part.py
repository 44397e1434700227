"""Every engine kind on this machine: numbers against the CPU's engine, time of full and cached steps, memory.

For TensorRT also whether captured runs compute what launched ones do, bit for bit, and what that is worth. An engine
that refuses (a GPU that TensorRT-RTX does not know, say) is not passed over: its refusal is the result.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.captures import captured_and_launched
from gpu.parts import DEMO_MODEL, ROOT, Kit, Measurements

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.backends.onnxruntime.providers import CPU, PROVIDERS
from tc_deploy.backends.registry import BACKENDS
from tc_deploy.bundle import MANIFEST
from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.errors import BackendError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.models.loading import load_model
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.types import FloatArray

EXAMPLE = ROOT / "examples" / "make_random_dit.py"
STEPS = {"steps": 8}
SCHEDULE = {"phase_start": 4, "cache_interval_early": 4, "cache_interval_late": 2}
"""F c1 c1 c1 | F c2 F c2: short, since the CPU samples beside it."""
LABEL, SEED = 7, 0
BUNDLE, ONE_GRAPH = "bundle", "one-graph"
"""Folders: with a graph for each variant, and with one for all."""
BATCHES = (1, 8)
GPU_PROVIDERS = tuple(name for name in PROVIDERS if name != CPU)
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"onnxruntime {name}": ("onnxruntime", {"provider": name}) for name in GPU_PROVIDERS},
    "tensorrt": ("tensorrt", {}),
    "tensorrt-rtx": ("tensorrt-rtx", {}),
    "torch": ("torch", {}),
    "torch compiled": ("torch", {"compile": True}),
    **{name: (name, {}) for name in BACKENDS if name in ("onnxruntime", "openvino")},
}
"""What is measured, those that need a GPU first: a backend with options."""
WITHOUT_GPU = ("demo, onnxruntime", "demo, openvino")
SHARING = ("onnxruntime cuda", "tensorrt", "tensorrt-rtx", "onnxruntime")
"""Those for which one graph of all variants is also measured."""
MEMORY = """
import sys
from cuda.bindings import runtime
import tc_deploy
runtime.cudaFree(0)
_, before, _ = runtime.cudaMemGetInfo()
pipeline = tc_deploy.load(sys.argv[1], sys.argv[2], batch_size=1)
pipeline.warmup()
_, after, _ = runtime.cudaMemGetInfo()
print(before - after)
"""


def measurements(kit: Kit) -> Measurements:
    """The part's: the demo on every engine, then a large model."""
    large = functools.cache(functools.partial(large_bundles, kit))
    return {
        **{f"demo, {engine}": functools.partial(on_demo, kit, engine) for engine in ENGINES},
        **{f"DiT-{kit.size}, {engine}": functools.partial(on_large, kit, large, engine, BUNDLE) for engine in ENGINES},
        **{
            f"DiT-{kit.size}, {engine}, one graph": functools.partial(on_large, kit, large, engine, ONE_GRAPH)
            for engine in SHARING
        },
    }


def on_demo(kit: Kit, engine: str) -> dict[str, Any]:
    """One engine on the demo's bundle."""
    bundle = kit.work / "demo"
    if not bundle.is_dir():
        shutil.copytree(kit.bundle, bundle)
    model = {"model": str(DEMO_MODEL)} if engine.startswith("torch") else {}
    return result_of(bundle, engine, kit.rounds, latents_by_cpu(kit.bundle), model)


def on_large(kit: Kit, bundles: Any, engine: str, name: str) -> dict[str, Any]:
    """One engine on the large model's bundle; the CPU's, which the others are compared with, stands in a copy."""
    folder = bundles()
    return result_of(folder / name, engine, kit.rounds, latents_by_cpu(folder / "cpu"))


def large_bundles(kit: Kit) -> Path:
    """A random DiT, its plan (half of the tokens kept, then a quarter), its two bundles, and one for the CPU."""
    folder = kit.work / "large"
    words = [kit.size, "-o", str(folder / "model"), "--sample-size", "32"]
    subprocess.run([sys.executable, str(EXAMPLE), *words], check=True)
    tokens = load_model(folder / "model").geometry.tokens
    keep = ((tokens // 2,), (tokens // 4,))
    settings = {"sampling": STEPS, "schedule": SCHEDULE, "cache": {"keep_counts": keep}, "measure": {"samples": 0}}
    calibrate(Recipe.model_validate({"model": str(folder / "model"), **settings}), folder / "plan")
    for name in (BUNDLE, ONE_GRAPH):
        export_bundle(folder / "plan", folder / name, ExportOptions(one_graph=name == ONE_GRAPH, check=False))
    shutil.copytree(folder / BUNDLE, folder / "cpu")
    build_target(folder / "cpu", "onnxruntime")
    return folder


@functools.cache
def latents_by_cpu(bundle: Path) -> dict[str, FloatArray]:
    """A picture by ONNX Runtime on the CPU: with every step full, and with the plan."""
    with tc_deploy.load(bundle, "onnxruntime") as pipeline:
        return {
            name: pipeline(class_labels=[LABEL], seed=SEED, full=name == "full").latents for name in ("full", "cached")
        }


def errors_to_cpu(bundle: Path, backend: str, reference: dict[str, FloatArray]) -> dict[str, dict[str, float]]:
    errors = {}
    with tc_deploy.load(bundle, backend) as pipeline:
        for name, expected in reference.items():
            found = pipeline(class_labels=[LABEL], seed=SEED, full=name == "full").latents
            errors[name] = {
                "max_relative_error": float(np.abs(found - expected).max() / np.abs(expected).max()),
                "psnr_db": image_psnr_db(torch.from_numpy(found), torch.from_numpy(expected), pixels=False),
            }
    return errors


def bench(bundle: Path, backend: str, batch: int, rounds: int) -> Any:
    """What ``tc-deploy bench`` says, in a process of its own: the GPU's memory is free again afterwards.

    One graph is timed in turn with separate ones, where the same kind of engine was built of them.
    """
    options = ["--backend", backend, "--batch-size", str(batch), "--rounds", str(rounds), "--json"]
    separate = bundle.with_name(BUNDLE)
    if bundle != separate and (separate / backend / MANIFEST).is_file():
        options += ["--against", f"{separate}:{backend}"]
    words = [sys.executable, "-m", "tc_deploy", "-q", "bench", str(bundle), *options]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise BackendError(answer.stderr.strip().splitlines()[-1])
    return json.loads(answer.stdout)


def device_memory_bytes(bundle: Path, backend: str) -> int:
    """What a pipeline takes of a GPU: engines with their weights, scratch memory, buffers, captured graphs."""
    words = [sys.executable, "-c", MEMORY, str(bundle), backend]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise BackendError(answer.stderr.strip().splitlines()[-1])
    return int(answer.stdout)


def result_of(
    bundle: Path, engine: str, rounds: int, reference: dict[str, FloatArray], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What one engine makes of a bundle; ``more`` are options that say where something is."""
    backend, options = ENGINES[engine]
    profile = {"batch_profile": (1, min(BATCHES), max(BATCHES))} if backend.startswith("tensorrt") else {}
    target = build_target(bundle, backend, {**options, **profile, **(more or {})})
    result: dict[str, Any] = {"version": target.backend_version, "options": options}
    result["errors_to_cpu"] = errors_to_cpu(bundle, backend, reference)
    result["bench"] = [bench(bundle, backend, batch, rounds) for batch in BATCHES]
    if torch.cuda.is_available():
        result["device_memory_bytes"] = device_memory_bytes(bundle, backend)
    if backend.startswith("tensorrt"):
        result["cuda_graphs"] = [captured_and_launched(bundle, backend, batch, rounds) for batch in BATCHES]
    return result
