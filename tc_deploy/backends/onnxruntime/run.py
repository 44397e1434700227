"""ONNX Runtime at run time: sessions on the CPU or on a GPU, bound to buffers.

In: ONNX graphs whose files have been checked. Out: a device, as the runtime knows it. Never: reads an option.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture
from tc_deploy.backends.compiled_at_load import are_shared
from tc_deploy.backends.host import HostBuffer, check_array, check_fits
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.backends.onnxruntime.providers import CPU, PROVIDERS, Provider
from tc_deploy.errors import BackendError, first_line
from tc_deploy.libraries import imported
from tc_deploy.manifest import WEIGHTS

_ERRORS_ONLY = 3
_SLOW_FUSION = "SkipLayerNormFusion"
"""Its one operator takes five times as long on a CPU as the two that it replaces: 1.1 against 0.22 ms for an Add and a
LayerNormalization of 512 x 384 (ONNX Runtime 1.32.0, one thread of an AMD EPYC with AVX2, 2026-11-25)."""
_GPU = "cuda"


def onnxruntime() -> Any:
    """The module.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    module = imported("onnxruntime")
    if not hasattr(module, "InferenceSession"):
        raise BackendError(
            "onnxruntime is installed but does not load: onnxruntime and onnxruntime-gpu were installed over"
            " each other; uninstall both, then install one (tc-deploy doctor shows it)"
        )
    return module


@functools.cache
def load_cuda() -> None:
    """Load CUDA and cuDNN from where pip puts them, where no loader looks; what is missing, a session says."""
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime().preload_dlls()


@functools.cache
def _share_scratch_memory() -> None:
    """Let sessions that ask for it take their scratch memory from one arena; a process can register it once."""
    module = onnxruntime()
    kind, use = module.OrtAllocatorType.ORT_ARENA_ALLOCATOR, module.OrtMemType.DEFAULT
    module.create_and_register_allocator(module.OrtMemoryInfo("Cpu", kind, 0, use), None)


class OrtGpuBuffer:
    """A tensor in a GPU's memory."""

    def __init__(self, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.value, self._dtype, self._shape = value, dtype, shape

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in.

        Raises:
            ValueError: it has another dtype or shape; nothing is converted or broadcast.
        """
        check_array(array, self._dtype, self._shape)
        self.value.update_inplace(array)

    def read(self) -> NDArray[Any]:
        """A copy."""
        return cast("NDArray[Any]", self.value.numpy())

    def rows(self, start: int, stop: int) -> OrtGpuBuffer:  # noqa: ARG002 - the protocol gives them
        """ONNX Runtime's Python interface has no part of a tensor on a GPU.

        Raises:
            BackendError: always.
        """
        raise BackendError(
            "ONNX Runtime shows no rows of a tensor on a GPU, so it neither serves by steps nor runs a prologue there;"
            " build for --backend tensorrt or tensorrt-rtx, or for --provider cpu"
        )

    def copy(self, source: Buffer) -> None:
        """Copy another one in, by way of the host."""
        self.write(source.read())


class OrtBoundGraph:
    """A session with all its inputs and outputs bound.

    Args:
        session: the session.
        weights: as for :class:`OrtGraph`, whom this outlives.
        binding: the buffers.
        run_options: which CUDA graph is theirs.
    """

    def __init__(self, session: Any, weights: NDArray[np.uint8] | None, binding: Any, run_options: Any) -> None:
        self._session, self._weights = session, weights
        self._binding, self._run_options = binding, run_options

    def run(self) -> None:
        """Run it; the outputs are there on return.

        Raises:
            BackendError: ONNX Runtime fails, for want of memory or at a value that an operator refuses.
        """
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:  # ONNX Runtime raises a class of its own per status, without a common base
            raise BackendError(f"ONNX Runtime fails: {first_line(error)}") from error


class OrtGraph:
    """One session.

    Args:
        session: the session.
        weights: memory that the session reads its weights from; None where it has its own.
    """

    def __init__(self, session: Any, weights: NDArray[np.uint8] | None) -> None:
        self._session, self._weights = session, weights
        self._bound = 0

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBoundGraph:
        """Fix the buffers by tensor name."""
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, cast("HostBuffer | OrtGpuBuffer", buffer).value)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, cast("HostBuffer | OrtGpuBuffer", buffer).value)
        options = onnxruntime().RunOptions()
        # A CUDA graph replays the addresses it was captured with, so every binding has a graph of its own.
        options.add_run_config_entry("gpu_graph_id", str(self._bound))
        self._bound += 1
        return OrtBoundGraph(self._session, self._weights, binding, options)


class OrtDevice:
    """The CPU or a GPU, as a target's options say.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime (the physical cores).
        provider: what computes.
        weights: on the CPU, whether all graphs read one mapping of the weights file (``shared``), or each packs a copy
            for its matrix products (``packed``); None decides by the size of the weights and by how many copies there
            would be.
        unfused: run every operator of the graph as it stands there, none fused, folded or moved: slow, and a fault that
            it cures is a fusion's.
    """

    def __init__(
        self,
        *,
        threads: int = 0,
        provider: Provider = PROVIDERS[CPU],
        weights: str | None = None,
        unfused: bool = False,
    ) -> None:
        self._module = onnxruntime()
        self._threads, self._provider = threads, provider
        self._on_cpu = provider is PROVIDERS[CPU]
        self._weights, self._unfused = weights, unfused
        self._mapped: dict[Path, NDArray[np.uint8]] = {}

    def buffers(self, specs: Sequence[BufferSpec]) -> list[Buffer]:
        """Allocate, filled with zeros.

        Raises:
            OutOfMemoryError: there is not that much.
        """
        if self._on_cpu:
            check_fits(specs)
        return [self._buffer(spec.dtype, spec.shape) for spec in specs]

    def _buffer(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Buffer:
        if self._on_cpu:
            array = np.zeros(shape, dtype)
            # On the CPU an OrtValue shares the array's memory.
            value_of = self._module.OrtValue.ortvalue_from_numpy
            return HostBuffer(array, value_of(array), lambda value, part, start, stop: value_of(part))
        value = self._module.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), _GPU, 0)
        return OrtGpuBuffer(value, dtype, shape)

    def capture(self, graphs: Sequence[BoundGraph]) -> Capture:
        """Run them in turn; on a GPU every binding has a CUDA graph of its own."""
        return InTurn(graphs)

    def load(self, path: Path) -> OrtGraph:
        """Make a session of an ONNX file; its external data lies beside it.

        Raises:
            BackendError: ONNX Runtime refuses the graph, or would compute it elsewhere than asked.
        """
        shared = self._on_cpu and are_shared(self._weights, path)
        weights = self._mapped_weights(path.with_name(WEIGHTS)) if shared else None
        providers = [(self._provider.name, dict(self._provider.options))]
        try:
            with warnings.catch_warnings():
                # That a provider is missing is said below, as an error.
                warnings.filterwarnings("ignore", "Specified provider", UserWarning)
                session = self._module.InferenceSession(
                    path, self._session_options(weights, shared=shared), providers=providers, enable_fallback=0
                )
        except Exception as error:  # as in OrtBoundGraph.run
            raise BackendError(f"{path}: ONNX Runtime refuses the graph: {first_line(error)}") from error
        found = session.get_providers()
        if found[0] != self._provider.name:
            raise BackendError(
                f"{path}: ONNX Runtime would run it with {found[0]}, not with {self._provider.name} as it was built for"
                f" (see: tc-deploy doctor); {self._provider.cure()}; or build again for another --provider"
            )
        return OrtGraph(session, weights)

    def _session_options(self, weights: NDArray[np.uint8] | None, *, shared: bool) -> Any:
        options = self._module.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _ERRORS_ONLY
        # The graphs of a bundle run in turn, each with threads of its own: those that wait must not spin, or they
        # take the cores from those that work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._on_cpu:
            options.add_session_config_entry("optimization.disable_specified_optimizers", _SLOW_FUSION)
        if self._unfused:
            options.graph_optimization_level = self._module.GraphOptimizationLevel.ORT_DISABLE_ALL
        if shared:
            _share_scratch_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.disable_prepacking", "1")
        if weights is not None:
            options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [weights.nbytes])
            # Without it every session copies what it reads.
            options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
        return options

    def _mapped_weights(self, path: Path) -> NDArray[np.uint8] | None:
        """The weights file in memory, mapped once for all graphs; None where there is none, or nothing in it."""
        if path not in self._mapped and path.is_file() and path.stat().st_size:
            self._mapped[path] = np.memmap(path, np.uint8, mode="r")
        return self._mapped.get(path)
