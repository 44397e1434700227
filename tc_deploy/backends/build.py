"""Build: a bundle to a target ``engines/NAME/<backend>`` that this machine runs.

In: a checked bundle. Out: a folder with what the backend made and its manifest, written last. Every graph is loaded
in the engine and run once before that, so a target that exists has worked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.backends.base import Buffer, Device
from tc_deploy.bundle import MANIFEST, check_files, new_folder, sha256_of_file
from tc_deploy.errors import BackendError
from tc_deploy.manifest import (
    BATCH,
    FORMAT_VERSION,
    GraphRecord,
    TargetManifest,
    TensorRecord,
    read_manifest,
    write_manifest,
)


def build_target(
    bundle: Path,
    backend: str = registry.DEFAULT,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> TargetManifest:
    """Build a bundle's graphs for one backend on this machine.

    Args:
        bundle: ``engines/NAME``.
        backend: the engine kind.
        options: its settings; ``threads``, and for openvino ``precision``.
        progress: told what is being done.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        BackendError: the engine is not installed, refuses a graph, or computes numbers that are not finite.
        StorageError: the target cannot be written.
    """
    engine = registry.backend(backend)
    version = engine.version()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files)
    options = dict(options or {})
    with new_folder(bundle / backend) as folder:
        device = engine.open(options)
        for name, record in manifest.graphs.items():
            progress(f"building {name}")
            _run_once(device, bundle / record.file, record, manifest.batch_size or 1, guided=manifest.guided)
        target = TargetManifest(
            kind="target",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            backend=backend,
            backend_version=version,
            options=options,
            manifest_sha256=sha256_of_file(bundle / MANIFEST),
            files={},
        )
        write_manifest(target, folder)
    return target


def _run_once(device: Device, path: Path, record: GraphRecord, batch: int, *, guided: bool) -> None:
    """Load a graph and run it on zeros."""

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
