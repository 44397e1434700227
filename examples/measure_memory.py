"""What all graphs of a bundle take of memory, against the full graph alone, in one way of keeping weights or another.

Each figure is of a fresh process that has every buffer of the bundle, loads some graphs and runs them once. Memory is
the proportional set size: a page of the weights file that three graphs have mapped counts once, as it lies there once.

    python examples/measure_memory.py engines/mine memory.json
"""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import openvino

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.backends.openvino.run import precisions_of
from tc_deploy.bundle import canonical_json, check_output, write_output
from tc_deploy.bundle.marks import JSON_FILE
from tc_deploy.hardware import hardware_line
from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS, read_manifest
from tc_deploy.plan import places_read

MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("onnxruntime", {"weights": "packed"}),
    ("onnxruntime", {"weights": "shared"}),
    ("openvino", {"precision": "f32", "weights": "packed"}),
    ("openvino", {"precision": "f32", "weights": "shared"}),
    ("openvino", {"precision": "bf16", "weights": "packed"}),
    ("openvino", {"precision": "bf16", "weights": "shared"}),
)
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from tc_deploy.backends import registry
from tc_deploy.backends.base import BufferSpec, loaded_graphs
from tc_deploy.manifest import Role, read_manifest

def resident_mib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024

bundle, backend, options, loaded = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
manifest = read_manifest(bundle)
device = registry.backend(backend).open(options)
sizes = manifest.batch_axes(manifest.batch_size or 1)
buffers = {}
for record in manifest.graphs.values():
    for tensor in (*record.inputs, *record.outputs):
        shape = tensor.shape_at(sizes)
        if (tensor.name, shape) not in buffers:
            [buffer] = device.buffers([BufferSpec(dtype=np.dtype(tensor.dtype), shape=shape)])
            if tensor.role is Role.TOKEN_INDEX:
                buffer.write(np.broadcast_to(np.arange(shape[-1]) % 16, shape).astype(tensor.dtype))
            buffers[tensor.name, shape] = buffer
before_mib = resident_mib()
graphs = loaded_graphs(device, bundle, {graph: manifest.graphs[graph].file for graph in loaded})
bound = []
for graph in loaded:
    record = manifest.graphs[graph]
    inputs, outputs = (
        {tensor.name: buffers[tensor.name, tensor.shape_at(sizes)] for tensor in tensors}
        for tensors in (record.inputs, record.outputs)
    )
    bound.append(graphs[graph].bind(inputs, outputs))
    bound[-1].run()
print(json.dumps({"before_mib": before_mib, "after_mib": resident_mib()}))
"""


def memory_mib(bundle: Path, backend: str, options: dict[str, Any], graphs: list[str]) -> dict[str, float]:
    words = [sys.executable, "-c", PROGRAM, str(bundle), backend, json.dumps({"threads": 2, **options}), *graphs]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if answer.returncode:
        raise click.ClickException(answer.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(answer.stdout)
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file at OUTPUT that this did not write.")
def main(bundle: Path, output: Path, force: bool) -> None:
    """Measure the memory that the graphs of BUNDLE take on a CPU, and write OUTPUT."""
    check_output(output, JSON_FILE, reads=places_read(bundle), force=force)
    manifest = read_manifest(bundle)
    rows = []
    offered = precisions_of(openvino.Core())
    for backend, options in MODES:
        if options.get("precision", offered[0]) not in offered:
            continue
        one = memory_mib(bundle, backend, options, ["full"])
        every = memory_mib(bundle, backend, options, list(manifest.graphs))
        # Of the engines alone: without Python, the library and the buffers, which both have.
        engines = {name: found["after_mib"] - found["before_mib"] for name, found in (("full", one), ("all", every))}
        row = {
            "backend": backend,
            "version": registry.backend(backend).version(),
            "options": options,
            "process_mib": {"full": round(one["after_mib"]), "all": round(every["after_mib"])},
            "engines_mib": {name: round(size) for name, size in engines.items()},
            "all_to_full": round(engines["all"] / engines["full"], 3),
        }
        rows.append(row)
        click.echo(json.dumps(row))
    document = {
        "made_by": f"tc-deploy {__version__}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": hardware_line(),
        "weights_mib": round(manifest.files[f"{ONNX_FOLDER}/{WEIGHTS}"].size_bytes / 2**20),
        "graphs": list(manifest.graphs),
        "results": rows,
    }
    write_output(output, canonical_json(document).encode())


if __name__ == "__main__":
    main()
