"""Load: a built target to graphs on a device, once every file that it reads has been compared with its checksum.

In: ``engines/NAME/<backend>``. Out: an open device and the bundle's graphs on it. Never: hands an engine a file that
has not been checked, or opens one that the target does not name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tc_deploy.backends import registry
from tc_deploy.backends.base import Device, Graph, loaded_graphs
from tc_deploy.backends.process import check_process
from tc_deploy.bundle import check_files, reading
from tc_deploy.errors import BundleError
from tc_deploy.manifest import TARGET_FOLDER, Manifest, read_target
from tc_deploy.onnx_files import check_graph_file

_LOG = logging.getLogger(__name__)


def load_target(
    bundle: Path, manifest: Manifest, backend: str, wanted: Callable[[str], bool] = lambda graph: True
) -> tuple[Device, dict[str, Graph]]:
    """Load the engines of a bundle whose documents have been checked.

    Args:
        bundle: ``engines/NAME``.
        manifest: its manifest.
        backend: which of its targets.
        wanted: says of a graph, by its name, whether it is loaded.

    Raises:
        BundleError: there is no such target, it was built from another plan or export, or a file of it is missing,
            truncated, altered or without a checksum, as one of the bundle's that its engines read may be.
        BackendError: the engine is not installed, this process was forked off one with engines, this machine is not
            one that the target was built for, or the engine refuses a graph.
    """
    with reading(bundle / backend, TARGET_FOLDER):
        return _loaded(bundle, manifest, backend, wanted)


def _loaded(
    bundle: Path, manifest: Manifest, backend: str, wanted: Callable[[str], bool]
) -> tuple[Device, dict[str, Graph]]:
    engine = registry.backend(backend)
    check_process()
    target = read_target(bundle, backend)
    checked = target.reads.keys() | {f"{backend}/{name}" for name in target.files}
    for file in engine.reads(manifest, target.options):
        if file not in checked:
            raise BundleError(f"{bundle}: no checksum for {file}, so it is not read; build again")
    check_files(bundle / backend, target.files)
    check_files(bundle, target.reads)
    for file, graphs in manifest.graphs_by_file().items():
        if file in target.reads:
            check_graph_file(bundle / file, list(graphs.values()))
    files = {name: engine.engine_file(record) for name, record in manifest.graphs.items() if wanted(name)}
    engine.check(bundle, target)
    version, where = target.backend_version, "" if target.gpu is None else f", built for {target.gpu.name}"
    _LOG.debug(
        "%s: %s %s, computes in %s, %s%s", bundle, backend, version, target.computes_in, target.options_in_words, where
    )
    device = engine.open(target.options)
    return device, loaded_graphs(device, bundle, files)
