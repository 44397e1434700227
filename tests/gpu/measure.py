"""Measures what tc-deploy does on a GPU, part by part, and writes one JSON file for each: ``run.sh`` calls this.

A part runs in a process of its own, so that what kills it kills no other, and its file is written anew after every
measurement. A file that is there is gone on with: what it holds is not measured again. No measurement begins when the
time is up, and one that is running then is ended.
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from gpu.parts import ROOT, Kit, Measurements

import tc_deploy
from tc_deploy.bundle import canonical_json, write_bytes
from tc_deploy.errors import first_line
from tc_deploy.hardware import hardware_line, nvidia_gpus
from tc_deploy.libraries import imported

PARTS = {
    "runtime": "gpu.runtime_part",
    "large": "gpu.large_part",
    "calibrate": "gpu.calibrate_part",
    "train": "gpu.train_part",
    "engines": "gpu.engines_part",
}
"""By name, the most valuable first."""
LIBRARIES = ("torch", "diffusers", "onnxruntime", "cuda.bindings", "triton", "tensorrt", "tensorrt_rtx", "numpy")
GRACE_S = 5.0
"""What a part has beyond its time before it is ended."""
NO_GPU = "needs an NVIDIA GPU, and PyTorch sees none"


def document_of(file: Path, part: str) -> dict[str, Any]:
    """What a part's file holds so far, with the machine that it is gone on with on."""
    found: dict[str, Any] = {"part": part, "results": {}}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    gpus, reason = nvidia_gpus()
    return found | {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": hardware_line(),
        "gpu": [{"name": gpu.name, "driver": gpu.driver, "memory_mib": gpu.memory_mib} for gpu in gpus] or reason,
        "python": sys.version.split()[0],
        "versions": {"tc_deploy": tc_deploy.__version__, **{name: version_of(name) for name in LIBRARIES}},
    }


def version_of(library: str) -> str | None:
    """A library's version; None where it is not installed."""
    try:
        return str(getattr(importlib.import_module(library), "__version__", "unknown"))
    except ImportError:
        return None


def answer_of(measurement: Any) -> dict[str, Any]:
    """What a measurement found or why it found nothing, and how long that took."""
    start = time.perf_counter()
    try:
        answer = {"found": measurement()}
    except Exception as error:  # noqa: BLE001 - whatever stopped it, that is the result
        answer = {"refused": f"{type(error).__name__}: {first_line(error)}"}
    return answer | {"seconds": round(time.perf_counter() - start, 1)}


def run_part(part: str, file: Path, kit: Kit, end: float) -> None:
    """Run what of a part is not in its file yet, until the time is up."""
    torch = imported("torch")
    try:
        module = importlib.import_module(PARTS[part])
    except ImportError as error:
        raise click.ClickException(f"{part}: {first_line(error)}; the machine was to bring it (machine.txt)") from None
    measurements: Measurements = module.measurements(kit)
    without_gpu = getattr(module, "WITHOUT_GPU", ())
    document = document_of(file, part)
    gpu = torch.cuda.is_available()
    for name, measurement in measurements.items():
        if name in document["results"]:
            continue
        if time.time() >= end:
            click.echo(f"{part}: the time is up before: {name}")
            return
        answer = answer_of(measurement) if gpu or name in without_gpu else {"refused": NO_GPU, "seconds": 0.0}
        document["results"][name] = answer
        write_bytes(file, canonical_json(document).encode())
        click.echo(f"{part}: {name}: {answer.get('refused', 'measured')} ({answer['seconds']} s)")


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--kit", "kit_folder", type=click.Path(path_type=Path, exists=True), help="What `make gpu-kit` packed.")
@click.option("--minutes", default=8.0, show_default=True, help="When to stop.")
@click.option("--part", "parts", type=click.Choice(tuple(PARTS)), multiple=True, default=tuple(PARTS))
@click.option("--size", default="XL/2", show_default=True, help="Of the large model.")
@click.option("--rounds", default=20, show_default=True, help="How often everything is timed.")
@click.option("--within", is_flag=True, hidden=True)
@click.option("--end", type=float, hidden=True)
def main(
    output: Path,
    kit_folder: Path | None,
    minutes: float,
    parts: tuple[str, ...],
    size: str,
    rounds: int,
    within: bool,
    end: float | None,
) -> None:
    """Measure on this machine's GPU, and write OUTPUT/PART.json for each part."""
    started = time.time()
    end = started + 60 * minutes if end is None else end
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.gettempdir()) / f"tc-deploy-gpu-{os.getuid()}-{tc_deploy.__version__}"
    work.mkdir(exist_ok=True)
    bundle = work / "digits" if kit_folder is None or not (kit_folder / "digits").is_dir() else kit_folder / "digits"
    if within:
        emoji = None if kit_folder is None or not (kit_folder / "emoji").is_dir() else kit_folder / "emoji"
        kit = Kit(
            bundle=bundle.resolve(), work=work, size=size, rounds=rounds, emoji=emoji, output=output.resolve(), end=end
        )
        run_part(parts[0], output / f"{parts[0]}.json", kit, end)
        return
    if not bundle.is_dir():
        make_demo(bundle)
    for part in parts:
        left = end - time.time()
        if left <= 0:
            click.echo(f"{part}: the time is up")
            continue
        words = [sys.executable, __file__, str(output), "--part", part, "--size", size, "--rounds", str(rounds)]
        words += ["--within", "--end", str(end), *(["--kit", str(kit_folder)] if kit_folder else [])]
        try:
            code = subprocess.run(words, check=False, timeout=left + GRACE_S).returncode
        except subprocess.TimeoutExpired:
            click.echo(f"{part}: ended, the time is up")
            continue
        if code:
            click.echo(f"{part}: ended with exit code {code}")
    click.echo(f"{output}: {time.time() - started:.0f} s")


def make_demo(bundle: Path) -> None:
    """The demo's bundle, where no kit brings it."""
    from tc_deploy.backends.build import build_target
    from tc_deploy.export.bundle_export import export_bundle
    from tc_deploy.export.options import ExportOptions

    export_bundle(ROOT / "calibration" / "digits", bundle, ExportOptions(samples=False))
    build_target(bundle, "onnxruntime")


if __name__ == "__main__":
    main()
