"""A DiT of a published size on PyTorch's backend: what cached steps take beside full ones, in bf16.

Weights are random, made on the GPU by seed. Times are of the GPU alone, by its own events; every contender of a table
is timed once per round. The model's batch is twice the samples', as with guidance.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.parts import ROOT, Kit, Measurements, taken_bytes
from torch import Tensor

from tc_deploy.backends.torch.run import TorchBoundGraph, TorchBuffer, TorchDevice, TorchGraph
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import latency_of, ratio_of
from tc_deploy.manifest import Role, cache_tensor
from tc_deploy.models.dit import FAMILY
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL, PHASES
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.tokencache.graphs import step_graphs
from tc_deploy.tokencache.precision import cast_products
from tc_deploy.types import Attention, Precision, Reuse, Skip

SAMPLE_SIZES = {256: 32, 512: 64}
"""Side of the latents by that of the picture."""
BATCHES = (1, 2, 8)
KEPT = {"full": 1.0, "half": 0.5, "quarter": 0.25}
"""Share of the tokens that a step computes: a full step, phase 1, phase 2."""
NAMES = tuple(KEPT)
COMPILED = ("full", "quarter")
EXAMPLE = ROOT / "examples" / "make_random_dit.py"


def measurements(kit: Kit) -> Measurements:
    """The part's."""
    models = Models(kit.size)
    times = {
        f"{pixels} px, batch {batch}": functools.partial(times_of, models, pixels, batch, kit.rounds)
        for pixels in SAMPLE_SIZES
        for batch in BATCHES
    }
    return {
        "512 px, batch 1": times.pop("512 px, batch 1"),
        "numbers against fp32": lambda: numbers(kit.size),
        "memory, 512 px, batch 1": lambda: memory(models),
        **times,
        "compiled, 512 px, batch 1": lambda: compiled(models, kit.rounds),
    }


class Models:
    """The model at one size of picture after the other, cast to bf16, with what its steps cost."""

    def __init__(self, size: str) -> None:
        self._size, self._pixels = size, 0
        self._made: Any = None

    def at(self, pixels: int) -> tuple[DiffusionTransformer, CacheRecord, dict[str, float]]:
        """The model, what its cached steps keep, and every step's FLOPs in those of a full one."""
        if self._pixels != pixels:
            self._made = None
            release()
            model = large_model(self._size, pixels)
            cache = cache_of(model)
            cost = count_flops(model, cache)
            flops = dict(zip(NAMES, (cost.full_flops, *cost.cached_flops), strict=True))
            cast_products(model, Precision.BF16)
            self._made, self._pixels = (model, cache, {name: n / cost.full_flops for name, n in flops.items()}), pixels
            release()
        found: tuple[DiffusionTransformer, CacheRecord, dict[str, float]] = self._made
        return found


def release() -> None:
    """Give the GPU back what nobody holds."""
    gc.collect()
    torch.cuda.empty_cache()


def large_model(size: str, pixels: int) -> DiffusionTransformer:
    """A DiT of a published size with random weights, on the GPU in fp32."""
    spec = importlib.util.spec_from_file_location("make_random_dit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    module = example.random_dit(size, SAMPLE_SIZES[pixels], device="cuda").eval().requires_grad_(False)
    options = ModelOptions()
    return DiffusionTransformer(
        source=f"DiT-{size}",
        module=module,
        family=FAMILY,
        geometry=FAMILY.geometry(module, options),
        config={},
        weights_sha256="",
        options=options,
    )


def cache_of(model: DiffusionTransformer) -> CacheRecord:
    """Half of the tokens in phase 1, a quarter in phase 2, in every block."""
    tokens, blocks = model.geometry.tokens, len(model.blocks)
    keep = tuple((int(tokens * KEPT[name]),) * blocks for name in NAMES[1:])
    return CacheRecord(
        reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=(keep[0], keep[1]), skip=Skip.BLOCKS
    )


class Steps:
    """Every variant of a step as PyTorch's backend binds it, with the buffers that they share.

    Args:
        model: the model.
        cache: what cached steps keep.
        batch: samples; the model's batch is twice that.
        compiled: whether steps are traced and compiled.
    """

    def __init__(self, model: DiffusionTransformer, cache: CacheRecord, batch: int, *, compiled: bool = False) -> None:
        self._device = TorchDevice(compiled=compiled, model=None)
        self._graphs = step_graphs(model, cache, PHASES, one_graph=False)
        rows, generator = 2 * batch, torch.Generator().manual_seed(batch)
        tensors: dict[str, Tensor] = {
            "hidden_states": torch.randn((rows, *model.geometry.latent_shape), generator=generator),
            "timestep": torch.full((rows,), 500.0),
            **model.random_conditions(rows, generator),
            Role.FORECAST_WEIGHTS: torch.tensor([[1.5, -0.5]]).repeat(rows, 1),
        }
        self.tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
        self._indices = {phase: token_index(model, cache, phase, rows, generator).cuda() for phase in PHASES}
        full = self._graphs[FULL]
        # Both ages of every cache are of the very input that cached steps get: these must give the full output.
        with torch.no_grad():
            made = full(*(self.tensors[name] for name in full.input_names))
        for name, value in zip(full.output_names, made, strict=True):
            self.tensors |= {cache_tensor(name, age).name: value.clone() for age in range(cache.forecast_order + 1)}
        release()

    def bind(self, name: str) -> TorchBoundGraph:
        """One of :data:`NAMES`, bound; its output is ``tensors["sample"]``."""
        variant = NAMES.index(name)
        graph = self._graphs[variant]
        given = self.tensors | ({Role.TOKEN_INDEX: self._indices[variant]} if variant != FULL else {})
        names = graph.input_names, graph.output_names
        taken = TorchGraph(self._device, Path(name), graph.eval(), names, traced=True)
        return taken.bind(buffers(given, names[0]), buffers(given, names[1]))


def token_index(model: DiffusionTransformer, cache: CacheRecord, phase: int, rows: int, generator: Any) -> Tensor:
    """(rows, sum of M) int32: other tokens in every block and row."""
    tokens, keep_counts = model.geometry.tokens, cache.keep_counts[phase - 1]
    parts = [
        torch.stack([torch.randperm(tokens, generator=generator)[: keep_counts[block]].sort()[0] for _ in range(rows)])
        for block in pruned_blocks(keep_counts, tokens)
    ]
    return torch.cat(parts, 1).int()


def buffers(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, TorchBuffer]:
    """Tensors as the backend's buffers; nobody reads these, so what numpy calls their type is of no account."""
    return {name: TorchBuffer(tensors[name], np.dtype(np.float32)) for name in names}


def gpu_ms(run: Any) -> float:
    """What the GPU takes from the first of some work to its last, gaps included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def times_of(models: Models, pixels: int, batch: int, rounds: int) -> dict[str, Any]:
    """Every step as a CUDA graph and launched kernel by kernel."""
    model, cache, flops = models.at(pixels)
    steps = Steps(model, cache, batch)
    bound = {name: steps.bind(name) for name in NAMES}
    ways = {(name, "graph"): one.run for name, one in bound.items()}
    ways |= {(name, "launched"): functools.partial(launched, one) for name, one in bound.items()}
    for run in ways.values():
        run()
    times_ms = interleaved({key: functools.partial(gpu_ms, run) for key, run in ways.items()}, rounds)
    found = {
        "tokens": model.geometry.tokens,
        "model_batch": 2 * batch,
        "flops_to_full": flops,
        "graph": table({name: times_ms[name, "graph"] for name in NAMES}, flops),
        "launched": table({name: times_ms[name, "launched"] for name in NAMES}, flops),
    }
    del bound, steps, ways
    release()
    return found


def launched(bound: TorchBoundGraph) -> None:
    """A step without its CUDA graph."""
    with torch.inference_mode():
        bound.compute()


def table(times_ms: Mapping[str, Sequence[float]], flops: Mapping[str, float]) -> dict[str, Any]:
    """Times, their ratio to the full step's, and how much of the saving in FLOPs is one in time."""
    ratios = {name: ratio_of(times, times_ms["full"]) for name, times in times_ms.items()}
    return {
        "latency": {name: latency_of(times) for name, times in times_ms.items()},
        "time_to_full": ratios,
        "efficiency": {name: round(flops[name] / ratio["median"], 3) for name, ratio in ratios.items()},
    }


def compiled(models: Models, rounds: int) -> dict[str, Any]:
    """Steps through torch.compile, and captured."""
    model, cache, flops = models.at(512)
    steps = Steps(model, cache, 1, compiled=True)
    seconds = {}
    ways = {}
    for name in COMPILED:
        start = time.perf_counter()
        ways[name] = steps.bind(name).run
        ways[name]()
        torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - start, 1)
    times_ms = interleaved({name: functools.partial(gpu_ms, run) for name, run in ways.items()}, rounds)
    return {"compile_s": seconds, "graph": table(times_ms, flops)}


def numbers(size: str) -> dict[str, Any]:
    """Of one step at 256 pixels, how far bf16 lies from fp32, for the full step and cached steps on its own caches."""
    samples: dict[tuple[str, str], Tensor] = {}
    model = large_model(size, 256)
    cache = cache_of(model)
    for precision in (Precision.FP32, Precision.BF16):
        cast_products(model, precision)
        steps = Steps(model, cache, 1)
        for name in NAMES:
            steps.bind(name).run()
            samples[precision.value, name] = steps.tensors[Role.SAMPLE].double().cpu()
    return {
        "snr_to_fp32_db": {
            name: snr_db(samples[Precision.BF16.value, name], samples[Precision.FP32.value, name]) for name in NAMES
        },
        # Caches of the same input: what a cached step makes is what the full one makes, up to rounding.
        "cached_to_full_snr_db": {
            name: snr_db(samples[Precision.FP32.value, name], samples[Precision.FP32.value, "full"])
            for name in NAMES[1:]
        },
    }


def snr_db(found: Tensor, exact: Tensor) -> float:
    """The power of the exact values over that of the error."""
    return round(float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum())), 2)


def memory(models: Models) -> dict[str, Any]:
    """What is taken of the GPU by the model with its plain step captured, and by all variants with their caches."""
    model, cache, _ = models.at(512)
    release()
    weights = taken_bytes()
    device = TorchDevice(compiled=False, model=None)
    steps = Steps(model, cache, 1)
    caches = sum(
        tensor.nbytes
        for name, tensor in steps.tensors.items()
        if name not in ("hidden_states", "timestep", "class_labels", Role.FORECAST_WEIGHTS)
    )
    inputs = {name: steps.tensors[name] for name in model.input_names}
    plain = TorchGraph(
        device,
        Path("plain"),
        lambda *tensors: (model.forward(dict(zip(model.input_names, tensors, strict=True))),),
        (model.input_names, (Role.SAMPLE,)),
        traced=False,
    ).bind(buffers(inputs, model.input_names), buffers(steps.tensors, (Role.SAMPLE,)))
    plain.run()
    release()
    with_plain = taken_bytes() - caches
    bound = [steps.bind(name) for name in NAMES]
    for one in bound:
        one.run()
    del plain
    release()
    all_variants = taken_bytes()
    return {
        "weights_and_context_bytes": weights,
        "plain_step_bytes": with_plain,
        "all_variants_bytes": all_variants,
        "caches_bytes": caches,
        "ratio": round(all_variants / with_plain, 3),
    }
