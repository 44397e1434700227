"""ONNX Runtime: the embedded default and the reference on the CPU, and its execution providers for NVIDIA GPUs.

Its engines are the bundle's ONNX graphs as they are: ONNX Runtime compiles them when a session is made, for the very
machine it runs on, so a target of this backend holds no copy of them, only the settings and the checks of its build.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture, Progress
from tc_deploy.backends.compiled_at_load import MOST_THREADS, PACKED, SHARED, WEIGHTS_MODES, CompiledAtLoad, are_shared
from tc_deploy.backends.host import HostBuffer, check_array, check_fits
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.errors import BackendError, first_line
from tc_deploy.libraries import imported, install_command
from tc_deploy.manifest import WEIGHTS, Manifest
from tc_deploy.types import Precision

_ERRORS_ONLY = 3
_SLOW_FUSION = "SkipLayerNormFusion"
"""Its one operator takes five times as long on a CPU as the two that it replaces: 1.1 against 0.22 ms for an Add and a
LayerNormalization of 512 x 384 (ONNX Runtime 1.32.0, one thread of an AMD EPYC with AVX2, 2026-11-25)."""
_GPU = "cuda"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider: what computes a session's graph."""

    name: str
    """ONNX Runtime's."""
    options: Mapping[str, str]
    """Its own settings."""
    extra: str | None
    """What brings it; None: no package of ONNX Runtime does."""
    also: str = ""
    """What it needs beside."""

    def cure(self) -> str:
        """How to get it; the packages of ONNX Runtime overwrite each other's files."""
        if self.extra is None:
            return "install a build of ONNX Runtime with it"
        removal = "" if self.extra == CPU else "pip uninstall -y onnxruntime; then "
        return f"{removal}{install_command(self.extra)}{self.also}"


CPU = "cpu"
PROVIDERS = {
    CPU: Provider(name="CPUExecutionProvider", options={}, extra="cpu"),
    "cuda": Provider(name="CUDAExecutionProvider", options={"enable_cuda_graph": "1", "use_tf32": "0"}, extra="cuda"),
    "tensorrt": Provider(
        name="TensorrtExecutionProvider",
        options={"trt_cuda_graph_enable": "1"},
        extra="cuda",
        also="; and TensorRT",
    ),
    "nv-tensorrt-rtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        options={"enable_cuda_graph": "1"},
        extra=None,
    ),
}
"""By the name that the option ``provider`` takes. A CUDA graph is captured of every binding, and fp32 is not TF32."""


def _onnxruntime() -> Any:
    onnxruntime = imported("onnxruntime")
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            "onnxruntime is installed but does not load: onnxruntime and onnxruntime-gpu were installed over"
            " each other; uninstall both, then install one (tc-deploy doctor shows it)"
        )
    return onnxruntime


@functools.cache
def _load_cuda() -> None:
    """Load CUDA and cuDNN from where pip puts them, where no loader looks; what is missing, a session says."""
    with contextlib.redirect_stdout(io.StringIO()):
        _onnxruntime().preload_dlls()


@functools.cache
def _share_scratch_memory() -> None:
    """Let sessions that ask for it take their scratch memory from one arena; a process can register it once."""
    module = _onnxruntime()
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
            "ONNX Runtime shows no rows of a tensor on a GPU, so it does not serve by steps there; build for"
            " --backend tensorrt or tensorrt-rtx, or for --provider cpu"
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
        options = _onnxruntime().RunOptions()
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
        self._module = _onnxruntime()
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


class OnnxRuntime(CompiledAtLoad):
    """The backend."""

    name = "onnxruntime"

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(_onnxruntime().__version__)

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the provider, and whose number of threads it is."""
        return {"provider": CPU, "threads": 0, **options}

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        """Run every graph once. fp16 graphs run, by casts to fp32 and back around what ONNX Runtime lacks on a CPU."""
        if manifest.precision is Precision.BF16 and options.get("provider", CPU) == CPU:
            raise BackendError(
                f"{bundle}: its graphs are in bf16, which ONNX Runtime does not compute on a CPU; build with --backend"
                " openvino or tensorrt-rtx, or export with --precision fp16 or fp32"
            )
        super().build(bundle, manifest, folder, options, progress)

    def open(self, options: Mapping[str, Any]) -> OrtDevice:
        """Open the CPU or a GPU; see :class:`OrtDevice` for the options."""
        settings = {"threads": 0, "provider": CPU, "weights": None, "unfused": False, **options}
        threads, name = settings["threads"], settings["provider"]
        provider = PROVIDERS.get(name) if isinstance(name, str) else None
        unknown = sorted(settings.keys() - {"threads", "provider", "weights", "unfused"})
        wrong = (
            not isinstance(threads, int)
            or not 0 <= threads <= MOST_THREADS
            or settings["weights"] not in (None, *WEIGHTS_MODES)
        )
        if unknown or wrong or provider is None or not isinstance(settings["unfused"], bool):
            found = repr(unknown[0]) if unknown else ", ".join(f"{key} {value!r}" for key, value in settings.items())
            raise BackendError(
                f"{self.name} takes the options threads, a number from 0 to {MOST_THREADS}, provider, one of"
                f" {', '.join(PROVIDERS)}, weights, {SHARED} or {PACKED}, and unfused, true or false;"
                f" found {found}; build again"
            )
        if name != CPU and "weights" in options:
            raise BackendError(f"{self.name} takes the option weights with provider {CPU} only; build again without it")
        available = _onnxruntime().get_available_providers()
        if provider.name not in available:
            raise BackendError(
                f"this ONNX Runtime has no {provider.name}, only {', '.join(available)};"
                f" {provider.cure()}; or build again for another --provider"
            )
        if name != CPU:
            _load_cuda()
        return OrtDevice(threads=threads, provider=provider, weights=settings["weights"], unfused=settings["unfused"])
