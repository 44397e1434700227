"""Every installed engine on this machine: numbers against PyTorch, time of full and cached steps, as JSON.

For TensorRT also whether captured runs compute what launched ones do, bit for bit, and what that is worth.

An engine that refuses (a GPU that TensorRT-RTX does not know, say) is not passed over: its refusal is the result.
``run.sh`` calls this; it runs on a machine without a GPU too, with the backends that need none.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import tc_deploy
from tc_deploy.backends.base import BoundGraph
from tc_deploy.backends.build import build_target
from tc_deploy.backends.load import load_target
from tc_deploy.backends.onnxruntime import CPU, PROVIDERS
from tc_deploy.backends.registry import BACKENDS
from tc_deploy.bench.clock import Clock, step_by_step
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import latency_of, ratio_of
from tc_deploy.bundle import MANIFEST, canonical_json, write_bytes
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.calibrate.stage import calibrate
from tc_deploy.errors import BackendError, TcDeployError
from tc_deploy.export.stage import export_bundle, sampling_from_plan, token_index_tables
from tc_deploy.hardware import hardware_line, nvidia_gpus
from tc_deploy.manifest import read_manifest
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise

EXAMPLE = Path(__file__).parents[2] / "examples" / "make_random_dit.py"
STEPS = {"steps": 8}
SCHEDULE = {"boundary": 4, "k1": 4, "k2": 2}
"""F c1 c1 c1 | F c2 F c2: short, since PyTorch samples beside it on the CPU."""
LABEL, SEED = 7, 0
BUNDLE, ONE_GRAPH = "bundle", "one-graph"
"""Folders: with a graph for each variant, and with one for all."""
ENGINES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{name: (name, {}, BUNDLE) for name in BACKENDS},
    **{f"{name}:one-graph": (name, {}, ONE_GRAPH) for name in ("tensorrt", "tensorrt-rtx", "onnxruntime")},
    **{f"onnxruntime:{name}": ("onnxruntime", {"provider": name}, BUNDLE) for name in PROVIDERS if name != CPU},
    **{
        f"onnxruntime:{name}:one-graph": ("onnxruntime", {"provider": name}, ONE_GRAPH)
        for name in PROVIDERS
        if name != CPU
    },
    "torch:compiled": ("torch", {"compile": True}, BUNDLE),
}
"""What is measured: a backend with options, on one of the two."""
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


def make_bundle(size: str, sample_size: int, folder: Path) -> None:
    """A random DiT, its plan (half of the tokens kept, then a quarter) and its two bundles, for any batch."""
    words = [size, "-o", str(folder / "model"), "--sample-size", str(sample_size)]
    subprocess.run([sys.executable, str(EXAMPLE), *words], check=True)
    tokens = load_model(folder / "model").geometry.tokens
    keep = ((tokens // 2,), (tokens // 4,))
    settings = {"sampling": STEPS, "schedule": SCHEDULE, "cache": {"keep_counts": keep}, "measure": {"samples": 0}}
    calibrate(Recipe.model_validate({"model": str(folder / "model"), **settings}), folder / "plan")
    for name in (BUNDLE, ONE_GRAPH):
        export_bundle(folder / "plan", folder / name, one_graph=name == ONE_GRAPH, progress=click.echo)


def pytorch_latents(folder: Path, noise: np.ndarray) -> dict[str, torch.Tensor]:
    """The same picture by the model itself, fp32 on the CPU: with every step full, and with the plan."""
    model = load_model(folder / "model")
    plan, tables = load_plan(folder / "plan")
    sampling, conditions = sampling_from_plan(plan), {"class_labels": torch.tensor([LABEL], dtype=torch.int32)}
    planned = TokenCachedSteps(model, plan.cache, plan.tprr(), token_index_tables(plan, tables))
    runs = {"full": lambda _, inputs: model.forward(inputs), "cached": planned}
    return {name: denoise(model, sampling, torch.from_numpy(noise), conditions, run) for name, run in runs.items()}


def errors_to_pytorch(bundle: Path, backend: str, reference: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    errors = {}
    with tc_deploy.load(bundle, backend) as pipeline:
        for name, expected in reference.items():
            found = torch.from_numpy(pipeline(class_labels=[LABEL], seed=SEED, full=name == "full").latents)
            difference, span = found - expected, expected.max() - expected.min()
            errors[name] = {
                "max_relative_error": float(difference.abs().max() / expected.abs().max()),
                "psnr_db": float(-10 * torch.log10((difference / span).square().mean())),
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


class Launched:
    """A bound graph that a device does not take for its own, so it is launched by itself and never captured."""

    def __init__(self, graph: BoundGraph) -> None:
        self.run = graph.run


def captured_and_launched(bundle: Path, backend: str, batch: int, rounds: int) -> dict[str, Any]:
    """The plan's run on the same engines: as one CUDA graph, as one per step, and every engine launched by itself."""
    engines = load_target(bundle, read_manifest(bundle), backend)
    captured = Pipeline(bundle, backend, batch_size=batch, engines=engines)
    launched = Pipeline(
        bundle, backend, batch_size=batch, engines=engines, watch=lambda name, graph, output: Launched(graph)
    )
    request = {**captured.placeholders(batch), "seed": SEED}
    ways = {
        "launched": functools.partial(launched, **request, on_step=step_by_step),
        "graph_per_step": functools.partial(captured, **request, on_step=step_by_step),
        "one_graph": functools.partial(captured, **request),
    }
    # The first run of each captures, and is launched for it; the second is what later ones are.
    latents = {way: [run().latents for _ in range(2)][-1] for way, run in ways.items()}
    clock = Clock()
    timed = {way: functools.partial(clock.timed, run, graphs=False) for way, run in ways.items()}
    times_ms = {way: [run.wall_ms for run in runs] for way, runs in interleaved(timed, rounds).items()}
    return {
        "batch_size": batch,
        "equal_to_launched": {way: bool(np.array_equal(made, latents["launched"])) for way, made in latents.items()},
        "latency": {way: latency_of(times) for way, times in times_ms.items()},
        "ratio_to_launched": {way: ratio_of(times, times_ms["launched"]) for way, times in times_ms.items()},
    }


def say_once(what: str, done: int, total: int) -> None:
    if done == total:
        click.echo(what)


def result_of(folder: Path, engine: str, batches: tuple[int, ...], rounds: int, reference: Any) -> dict[str, Any]:
    """What one engine makes of a bundle, as far as it gets."""
    backend, options, name = ENGINES[engine]
    bundle = folder / name
    result: dict[str, Any] = {"backend": backend, "options": options, "graphs": name}
    try:
        profile = {"batch_profile": (1, min(batches), max(batches))} if backend.startswith("tensorrt") else {}
        target = build_target(bundle, backend, {**options, **profile}, say_once)
        result["version"] = target.backend_version
        result["errors_to_pytorch"] = errors_to_pytorch(bundle, backend, reference)
        result["bench"] = [bench(bundle, backend, batch, rounds) for batch in batches]
        if backend.startswith("tensorrt"):
            result["device_memory_bytes"] = device_memory_bytes(bundle, backend)
            result["cuda_graphs"] = [captured_and_launched(bundle, backend, batch, rounds) for batch in batches]
    except TcDeployError as error:
        result["refused"] = str(error)
        click.echo(f"{engine}: {error}")
    return result


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--size", default="XL/2", show_default=True)
@click.option("--sample-size", "sample_sizes", type=int, multiple=True, default=(32, 64), show_default=True)
@click.option("--batch-size", "batches", type=int, multiple=True, default=(1, 2, 8), show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--engine", "engines", type=click.Choice(tuple(ENGINES)), multiple=True, default=tuple(ENGINES))
def main(
    output: Path,
    size: str,
    sample_sizes: tuple[int, ...],
    batches: tuple[int, ...],
    rounds: int,
    engines: tuple[str, ...],
) -> None:
    """Measure every engine that is installed here, and write OUTPUT."""
    results = []
    for sample_size in sample_sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_bundle(size, sample_size, folder)
            shape = read_manifest(folder / BUNDLE).latent_shape
            noise = np.random.Generator(np.random.Philox(key=SEED)).standard_normal(shape, dtype=np.float32)[None]
            reference = pytorch_latents(folder, noise)
            for engine in engines:
                made = result_of(folder, engine, batches, rounds, reference)
                results.append({"model": f"DiT-{size}", "sample_size": sample_size, **made})
    gpus = [{"name": gpu.name, "driver": gpu.driver} for gpu in nvidia_gpus()[0]]
    today = dt.datetime.now(dt.UTC).date().isoformat()
    document = {"date": today, "hardware": hardware_line(), "gpus": gpus, "rounds": rounds, "results": results}
    write_bytes(output, canonical_json(document).encode())
    click.echo(f"{output}: {len(results)} results")


if __name__ == "__main__":
    main()
