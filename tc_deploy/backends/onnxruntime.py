"""ONNX Runtime on the CPU: the embedded default and the reference.

Its engines are the bundle's ONNX graphs as they are: ONNX Runtime compiles them when a session is made, for the very
machine it runs on, so a target of this backend holds no copy of them, only the settings and the checks of its build.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from tc_deploy.backends.base import Buffer, Graph, Progress
from tc_deploy.backends.compiled_at_load import CompiledAtLoad
from tc_deploy.backends.host import HostBuffer
from tc_deploy.errors import BackendError, first_line
from tc_deploy.manifest import Manifest
from tc_deploy.types import Precision

_ERRORS_ONLY = 3
_PROVIDERS = ["CPUExecutionProvider"]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "ONNX Runtime is not installed; install tc-deploy[cpu] (or tc-deploy[cuda], never both)"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            "ONNX Runtime is broken: onnxruntime and onnxruntime-gpu were installed over each other;"
            " uninstall both, then install one (tc-deploy doctor shows it)"
        )
    return onnxruntime


class OrtBoundGraph:
    """A session with all its inputs and outputs bound."""

    def __init__(self, session: Any, binding: Any) -> None:
        self._session, self._binding = session, binding

    def run(self) -> None:
        """Run it; the outputs are there on return.

        Raises:
            BackendError: ONNX Runtime fails, for want of memory or at a value that an operator refuses.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a class of its own per status, without a common base
            raise BackendError(f"ONNX Runtime fails: {first_line(error)}") from error


class OrtGraph:
    """One session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBoundGraph:
        """Fix the buffers by tensor name."""
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, cast("HostBuffer", buffer).value)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, cast("HostBuffer", buffer).value)
        return OrtBoundGraph(self._session, binding)


class OrtDevice:
    """The CPU, with the threads that a target's options grant.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime (the physical cores).
        unfused: run every operator of the graph as it stands there, none fused, folded or moved: slow, and a fault that
            it cures is a fusion's.
    """

    def __init__(self, *, threads: int, unfused: bool = False) -> None:
        self._module = _onnxruntime()
        self._options = self._module.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = _ERRORS_ONLY
        if unfused:
            self._options.graph_optimization_level = self._module.GraphOptimizationLevel.ORT_DISABLE_ALL
        # The graphs of a bundle run in turn, each with threads of its own: those that wait must not spin, or they
        # take the cores from those that work.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def buffer(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> HostBuffer:
        """Allocate, filled with zeros."""
        array = np.empty(shape, dtype)
        # On the CPU an OrtValue shares the array's memory.
        return HostBuffer(array, self._module.OrtValue.ortvalue_from_numpy(array))

    def load(self, path: Path) -> Graph:
        """Make a session of an ONNX file; its external data lies beside it."""
        try:
            return OrtGraph(self._module.InferenceSession(path, self._options, providers=_PROVIDERS))
        except Exception as error:  # as in OrtBoundGraph.run
            raise BackendError(f"{path}: ONNX Runtime refuses the graph: {first_line(error)}") from error


class OnnxRuntime(CompiledAtLoad):
    """The backend."""

    name = "onnxruntime"

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(_onnxruntime().__version__)

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        """Run every graph once. fp16 graphs run, by casts to fp32 and back around what ONNX Runtime lacks on a CPU."""
        if manifest.precision is Precision.BF16:
            raise BackendError(
                f"{bundle}: its graphs are in bf16, which ONNX Runtime does not compute on a CPU; build with --backend"
                " openvino or tensorrt-rtx, or export with --precision fp16 or fp32"
            )
        super().build(bundle, manifest, folder, options, progress)

    def open(self, options: Mapping[str, Any]) -> OrtDevice:
        """Open the CPU; see :class:`OrtDevice` for the options."""
        unknown = sorted(options.keys() - {"threads", "unfused"})
        threads, unfused = options.get("threads", 0), options.get("unfused", False)
        if unknown or not isinstance(threads, int) or threads < 0 or not isinstance(unfused, bool):
            found = f"{unknown[0]!r}" if unknown else f"threads {threads!r}, unfused {unfused!r}"
            raise BackendError(
                f"{self.name} takes the options threads, a number from 0 on, and unfused, true or false; found {found};"
                " build again"
            )
        return OrtDevice(threads=threads, unfused=unfused)
