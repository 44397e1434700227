"""Cached engines against the best full engine on this CPU, all in one interleaved run.

Every contender makes the same pictures from the same noise in every round, in a changing order: OpenVINO and ONNX
Runtime under the plan and with every step full, in each precision that the CPU offers, and PyTorch with every step
full, compiled, in bf16. Beside a plan's time stands its PSNR to the full run of its own engine and precision.

    python examples/compare_cached_with_full.py engines/digits compared.json
"""

from __future__ import annotations

import datetime as dt
import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import openvino
import torch

import tc_deploy
from tc_deploy import __version__
from tc_deploy.backends.build import build_target
from tc_deploy.backends.openvino.run import precisions_of
from tc_deploy.backends.registry import backend as backend_of
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import latency_of, ratio_of
from tc_deploy.bundle import canonical_json, check_output, write_output
from tc_deploy.bundle.marks import JSON_FILE
from tc_deploy.hardware import hardware_line
from tc_deploy.models.loading import load_model
from tc_deploy.plan import places_read
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.tokencache.sampler import denoise

SEED = 0
WARM_UPS = 2
TARGETS = ("onnxruntime", "openvino")
Request = Callable[[], np.ndarray]


def pytorch_bf16(plan: Any, model: Path, labels: list[int], noise: np.ndarray) -> Request:
    """A full run of the model itself in bf16, compiled; the solver stays in fp32."""
    transformer, sampling = load_model(model), sampling_from_plan(plan)
    compiled = torch.compile(transformer.module.to(torch.bfloat16))
    conditions = {"class_labels": torch.tensor(labels, dtype=torch.int32)}

    def step(_: int, inputs: Any) -> torch.Tensor:
        given = {"class_labels": inputs["class_labels"].long(), "timestep": inputs["timestep"]}
        states = inputs["hidden_states"].to(torch.bfloat16)
        return compiled(hidden_states=states, **given, return_dict=False)[0].float()

    return lambda: denoise(transformer, sampling, torch.from_numpy(noise), conditions, step).numpy()


def timed(request: Request) -> tuple[float, np.ndarray]:
    start_s = time.perf_counter()
    made = request()
    return 1e3 * (time.perf_counter() - start_s), made


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--batch-size", default=20, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--pytorch/--no-pytorch", default=True, show_default=True, help="Compile the model in PyTorch as well.")
@click.option("--force", is_flag=True, help="Replace a file at OUTPUT that this did not write.")
@click.option("--model", type=click.Path(path_type=Path), help="The checkpoint, where it is not where the plan says.")
def main(
    bundle: Path, output: Path, batch_size: int, rounds: int, pytorch: bool, model: Path | None, force: bool
) -> None:
    """Time BUNDLE's plan against every full run, and write OUTPUT."""
    check_output(output, JSON_FILE, reads=[*places_read(bundle), *([] if model is None else [model])], force=force)
    offered = precisions_of(openvino.Core())
    engines: dict[str, tuple[str, dict[str, Any]]] = {
        "onnxruntime fp32": ("onnxruntime", {"weights": "packed"}),
        **{f"openvino {precision}": ("openvino", {"precision": precision}) for precision in offered},
    }
    requests: dict[tuple[str, str], Request] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, (backend, options) in engines.items():
            copy = folder / name
            shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns(*TARGETS))
            build_target(copy, backend, options)
            pipeline = stack.enter_context(tc_deploy.load(copy, backend, batch_size=batch_size))
            labels = [number % 10 for number in range(batch_size)]
            noise = pipeline.noise(SEED, batch_size)
            call = functools.partial(pipeline, class_labels=labels, latents=noise, decode=False)
            for kind, full in (("plan", False), ("full", True)):
                requests[name, kind] = lambda call=call, full=full: call(full=full).latents
        source = model or Path(pipeline.plan.model.source)
        if pytorch:
            requests["pytorch bf16, compiled", "full"] = pytorch_bf16(pipeline.plan, source, labels, noise)
        actions = {key: functools.partial(timed, request) for key, request in requests.items()}
        interleaved(actions, WARM_UPS)
        runs = interleaved(actions, rounds)
        pixels = pipeline.manifest.pixels
    times = {key: [wall_ms for wall_ms, _ in found] for key, found in runs.items()}
    images = {key: torch.from_numpy(found[-1][1]) for key, found in runs.items()}
    best = min((key for key in times if key[1] == "full"), key=lambda key: statistics.median(times[key]))
    reference = images["onnxruntime fp32", "full"]
    psnr = functools.partial(image_psnr_db, pixels=pixels)
    rows = []
    for (name, kind), walls in times.items():
        rows.append(
            {
                "engine": name,
                "run": kind,
                **latency_of(walls),
                "speedup_to_best_full": ratio_of(times[best], walls),
                "psnr_db_to_own_full": None if kind == "full" else psnr(images[name, kind], images[name, "full"]),
                "psnr_db_to_fp32_full": psnr(images[name, kind], reference),
            }
        )
        click.echo(rows[-1])
    document = {
        "made_by": f"tc-deploy {__version__}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": hardware_line(),
        "versions": {name: backend_of(name).version() for name in ("torch", *TARGETS)},
        "batch_size": batch_size,
        "rounds": rounds,
        "best_full": " ".join(best),
        "results": rows,
    }
    write_output(output, canonical_json(document).encode())


if __name__ == "__main__":
    main()
