"""The device runtime on real CUDA: memory, captured runs, a thousand requests, two threads; and PyTorch's backend.

Engines are PyTorch's kernels (``kernel_engines.py``), the model is the demo's, and what it makes is compared with ONNX
Runtime on the CPU.
"""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu.captures import captured_and_launched
from gpu.kernel_engines import kernel_engines, model_on_gpu, tensor_at
from gpu.parts import DEMO_MODEL, Kit, Measurements, taken_bytes

import tc_deploy
from tc_deploy.backends.arena import ALIGNMENT_BYTES
from tc_deploy.backends.base import BufferSpec
from tc_deploy.backends.build import build_target
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.tensorrt.run import TrtDevice
from tc_deploy.bench.spread import latency_of
from tc_deploy.runtime.pipeline import Pipeline

CPU_ENGINE = "onnxruntime"
REQUESTS, WARM_REQUESTS = 1000, 20
THREAD_REQUESTS = 50
LABELS = [3, 8]
SIZES = ((1,), (3, 5), (2, 1000, 7), (4096, 1025))
"""Of buffers, in elements: none but the last two is a multiple of the alignment."""


def measurements(kit: Kit) -> Measurements:
    """The part's."""
    return {
        "buffers": buffers,
        "captured runs, batch 1": lambda: captured(kit, 1),
        "captured runs, batch 8": lambda: captured(kit, 8),
        f"{REQUESTS} requests": lambda: many_requests(kit),
        "two pipelines in two threads": lambda: two_threads(kit),
        "PyTorch's backend": lambda: pytorch_backend(kit),
    }


def resident_bytes() -> int:
    """This process's resident memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def buffers() -> dict[str, Any]:
    """Alignment, zeros in new memory, copies there and back, pinned and not; and that memory goes back."""
    cuda = Cuda()
    device = TrtDevice("none", _NoRuntime(), cuda, [], user_managed=None)
    big = BufferSpec(dtype=np.dtype(np.float32), shape=(2**26,))
    cuda.wait()
    before = taken_bytes()
    specs = [
        BufferSpec(dtype=np.dtype(dtype), shape=shape, exchanged=exchanged)
        for shape in SIZES
        for dtype in (np.float32, np.int32)
        for exchanged in (False, True)
    ]
    made = device.buffers([*specs, big])
    aligned = all(buffer.address % ALIGNMENT_BYTES == 0 for buffer in made)
    zeros = not any(buffer.read().any() for buffer in made[:-1])
    held = taken_bytes() - before
    generator = np.random.default_rng(0)
    same = True
    for _ in range(3):
        values = [generator.integers(-(2**31), 2**31, spec.shape).astype(spec.dtype) for spec in specs]
        for buffer, value in zip(made[:-1], values, strict=True):
            buffer.write(value)
        same &= all(np.array_equal(buffer.read(), value) for buffer, value in zip(made[:-1], values, strict=True))
    # Memory that is written twice without a wait between: the later value counts.
    exchanged = next(number for number, spec in enumerate(specs) if spec.exchanged)
    for value in (1, 2):
        made[exchanged].write(np.full(specs[exchanged].shape, value, specs[exchanged].dtype))
    same &= bool((made[exchanged].read() == 2).all())
    seen = tensor_at(made[0].address, specs[0].dtype, specs[0].shape).cpu().numpy()
    same &= np.array_equal(seen, made[0].read())
    del made, buffer
    gc.collect()
    return {
        "aligned": aligned,
        "new_memory_is_zero": zeros,
        "copies_keep_every_bit": bool(same),
        "held_bytes": held,
        "left_bytes": taken_bytes() - before,
        "gpu": cuda.gpu().model_dump(),
    }


class _NoRuntime:
    """A device without engines."""


def captured(kit: Kit, batch: int) -> dict[str, Any]:
    """One CUDA graph for a run, one for each step, and launches one by one: the same bits; against the CPU's engine."""
    cuda = Cuda()
    engines = kernel_engines(kit.bundle, model_on_gpu(kit.bundle), cuda)
    found = captured_and_launched(kit.bundle, CPU_ENGINE, batch, kit.rounds, engines=engines)
    with Pipeline(kit.bundle, CPU_ENGINE, batch_size=batch, engines=engines) as pipeline:
        pipeline.warmup()
        found["errors_to_cpu"] = errors(kit.bundle, pipeline, batch)
    return found


def errors(bundle: Path, pipeline: Pipeline, batch: int) -> dict[str, float]:
    """Largest departure of the latents from those of ONNX Runtime on the CPU, relative to the largest of them."""
    request: dict[str, Any] = {"class_labels": [index % 10 for index in range(batch)], "seed": 11}
    with tc_deploy.load(bundle, CPU_ENGINE, batch_size=batch) as other:
        departures = {}
        for name, full in (("full", True), ("cached", False)):
            expected = other(**request, full=full).latents
            difference = np.abs(pipeline(**request, full=full).latents - expected).max()
            departures[name] = float(difference / np.abs(expected).max())
    return departures


def many_requests(kit: Kit) -> dict[str, Any]:
    """What a thousand requests leave behind, and whether the last is answered as the first was."""
    engines = kernel_engines(kit.bundle, model_on_gpu(kit.bundle), Cuda())
    with Pipeline(kit.bundle, CPU_ENGINE, batch_size=1, engines=engines) as pipeline:
        first = pipeline(class_labels=[0], seed=0).latents
        for number in range(WARM_REQUESTS):
            pipeline(class_labels=[number % 10], seed=number)
        device_bytes, host_bytes = taken_bytes(), resident_bytes()
        times_ms = []
        for number in range(REQUESTS):
            start = time.perf_counter()
            pipeline(class_labels=[number % 10], seed=number)
            times_ms.append(1e3 * (time.perf_counter() - start))
        again = pipeline(class_labels=[0], seed=0).latents
        return {
            "requests": REQUESTS,
            "device_bytes_more": taken_bytes() - device_bytes,
            "host_bytes_more": resident_bytes() - host_bytes,
            "same_answer": bool(np.array_equal(first, again)),
            "latency": latency_of(times_ms),
        }


def two_threads(kit: Kit) -> dict[str, Any]:
    """Two pipelines, each with a stream of its own, answer at once what each answers alone."""
    model = model_on_gpu(kit.bundle)
    pipelines = [
        Pipeline(kit.bundle, CPU_ENGINE, batch_size=1, engines=kernel_engines(kit.bundle, model, Cuda()))
        for _ in range(2)
    ]

    def answers(pipeline: Pipeline) -> list[bytes]:
        made = (pipeline(class_labels=[number % 10], seed=number) for number in range(THREAD_REQUESTS))
        return [result.latents.tobytes() for result in made]

    alone_s, together_s = time.perf_counter(), 0.0
    alone = [answers(pipeline) for pipeline in pipelines]
    alone_s = time.perf_counter() - alone_s
    together: list[list[bytes]] = [[], []]
    failures: list[str] = []

    def run(number: int) -> None:
        try:
            together[number] = answers(pipelines[number])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    together_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together_s = time.perf_counter() - together_s
    return {
        "requests_each": THREAD_REQUESTS,
        "same_as_each_other": alone[0] == alone[1],
        "same_as_alone": together == alone,
        "failures": failures,
        "time_to_one_after_the_other": together_s / alone_s,
    }


def pytorch_backend(kit: Kit) -> dict[str, Any]:
    """The backend ``torch``: the demo's run against the CPU's, one after another and repeated."""
    bundle = kit.work / "torch"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(kit.bundle, bundle)
    build_target(bundle, "torch", {"model": str(DEMO_MODEL)})
    with tc_deploy.load(bundle, "torch", batch_size=2) as pipeline:
        pipeline.warmup()
        found: dict[str, Any] = {"errors_to_cpu": errors(bundle, pipeline, 2)}
        runs = [pipeline(class_labels=LABELS, seed=5).latents for _ in range(3)]
        found["same_answer"] = all(np.array_equal(runs[0], run) for run in runs)
        times = {}
        for name, full in (("full", True), ("cached", False)):
            pipeline(class_labels=LABELS, seed=5, full=full)
            times_ms = []
            for _ in range(kit.rounds):
                start = time.perf_counter()
                pipeline(class_labels=LABELS, seed=5, full=full)
                times_ms.append(1e3 * (time.perf_counter() - start))
            times[name] = latency_of(times_ms)
        found["latency"] = times
    return found
