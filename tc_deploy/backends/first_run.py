"""The first run of a bundle's graphs, for backends whose build is that run: what computes here once can be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tc_deploy.backends.base import Buffer, Device, Progress
from tc_deploy.errors import BackendError
from tc_deploy.manifest import BATCH, GraphRecord, Manifest, TensorRecord


def run_each_once(device: Device, bundle: Path, manifest: Manifest, progress: Progress) -> None:
    """Load every ONNX graph of a bundle and run it on zeros.

    Raises:
        BackendError: the engine refuses a graph, or computes numbers that are not finite.
    """
    for name, record in manifest.graphs.items():
        progress(f"building {name}", 1, 1)
        _run_once(device, bundle / record.file, record, manifest.batch_size or 1, guided=manifest.guided)


def _run_once(device: Device, path: Path, record: GraphRecord, batch: int, *, guided: bool) -> None:
    def buffers(tensors: tuple[TensorRecord, ...]) -> dict[str, Buffer]:
        made = {}
        for tensor in tensors:
            shape = tuple(
                size if isinstance(size, int) else batch * (1 if size == BATCH or not guided else 2)
                for size in tensor.shape
            )
            made[tensor.name] = device.buffer(np.dtype(tensor.dtype), shape)
        return made

    outputs = buffers(record.outputs)
    device.load(path).bind(buffers(record.inputs), outputs).run()
    for name, buffer in outputs.items():
        if not np.isfinite(buffer.read()).all():
            raise BackendError(
                f"{path}: output {name} is not finite on a first run with zeros; the engine is not usable"
            )
