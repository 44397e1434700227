"""TensorRT and TensorRT-RTX, which share one Python API.

In: the bundle's ONNX graphs. Out: one engine per graph in the target's folder (``tensorrt/build.py`` makes it).
TensorRT builds for the GPU of this machine and needs it; TensorRT-RTX builds for a list of compute capabilities, on a
machine without a GPU too. Running (``tensorrt/run.py``) needs a GPU either way. Never: hands the deserialiser an engine
for another version or GPU.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tc_deploy.backends.base import Progress
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.tensorrt.build import EngineJob, build_engine
from tc_deploy.backends.tensorrt.options import (
    TensorRtOptions,
    batch_axes,
    check_turing,
    checked_options,
    engine_options,
)
from tc_deploy.backends.tensorrt.rtx import RtxExtras
from tc_deploy.backends.tensorrt.run import TrtDevice
from tc_deploy.bundle import MANIFEST, check_files, read_document, real_path
from tc_deploy.errors import BackendError, BundleError, UsageError, first_line
from tc_deploy.libraries import imported
from tc_deploy.manifest import (
    BATCH,
    ENGINE_SUFFIX,
    ONNX_FOLDER,
    WEIGHTS,
    EngineIdentity,
    GpuRecord,
    GraphRecord,
    Manifest,
    ProfileRecord,
    TargetManifest,
    TensorRecord,
    read_engine_record,
)
from tc_deploy.plan import load_plan

TIMING_CACHE = "timing.cache"
LARGE_WEIGHTS_MIB = 256
"""From here on it is worth a word that several engines hold them."""
AMPERE = 8
"""Major compute capability."""
BUILD_MEMORY_MIB, BUILD_MEMORY_PER_WEIGHTS = 600, 3.5
"""A build's peak of memory: measured with TensorRT-RTX 1.7 on random DiTs from 1 MiB to 2.8 GiB of weights;
one graph for all variants takes most, 574 MiB for 11 MiB of weights."""


class TensorRt:
    """The backend, for one of the two modules.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        cuda: opens the GPU.
    """

    def __init__(self, module: str, *, cuda: Callable[[], Cuda] = Cuda) -> None:
        self.name = module.replace("_", "-")
        self._module, self._cuda = module, cuda
        self._ahead_of_time = module == "tensorrt_rtx"

    def version(self) -> str:
        """The module's version."""
        return str(self._import().__version__)

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With how runs are launched; what the engines are built with stands beside each of them."""
        return {"use_cuda_graph": TensorRtOptions().use_cuda_graph, **options}

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> GpuRecord | None:
        """Build one engine of each file after another, each in a process of its own."""
        chosen = self._options(options)
        capabilities = self._capability_names(chosen)
        check_turing(self.name, chosen, manifest)
        axes = batch_axes(chosen, manifest, load_plan(bundle)[0].schedule.steps)
        if axes:
            # The default, written out, is the same profile: an engine that has it is not built again.
            chosen = chosen.model_copy(update={"batch_profile": axes[BATCH]})
        gpu = None if self._ahead_of_time else self._cuda().gpu()
        weights = manifest.files[f"{ONNX_FOLDER}/{WEIGHTS}"]
        expected_mib = BUILD_MEMORY_MIB + BUILD_MEMORY_PER_WEIGHTS * weights.size_bytes / 2**20
        progress(f"each build takes up to about {expected_mib:.0f} MiB of memory", 1, 1)
        copies = len({graph.file for graph in manifest.graphs.values() if graph.runs_model})
        if copies > 1 and weights.size_bytes >= LARGE_WEIGHTS_MIB * 2**20:
            progress(f"{copies} engines will hold the weights; tc-deploy export --one-graph makes one of them", 1, 1)
        earlier = self._earlier_target(bundle)
        for file, graphs in manifest.graphs_by_file().items():
            profiles = _profiles(graphs)
            sizes = {size for profile in profiles for tensor in profile.inputs for size in tensor.shape}
            identity = EngineIdentity(
                backend=self.name,
                backend_version=self.version(),
                options=engine_options(chosen, ahead_of_time=self._ahead_of_time),
                onnx_sha256=manifest.files[file].sha256,
                weights_sha256=weights.sha256,
                profiles=profiles,
                axes={size: axes[size] for size in axes if size in sizes},
            )
            name = Path(file).stem
            engine = folder / f"{name}{ENGINE_SUFFIX}"
            if earlier is not None and gpu == earlier.gpu and _is_built(bundle / self.name / engine.name, identity):
                progress(f"{name} is unchanged", 1, 1)
                for suffix in (ENGINE_SUFFIX, ".json", ".log"):
                    shutil.copyfile((bundle / self.name / name).with_suffix(suffix), engine.with_suffix(suffix))
                continue
            job = EngineJob(
                module=self._module,
                onnx=str(real_path(bundle / file)),
                engine=str(engine),
                timing_cache=None if self._ahead_of_time else str(folder / TIMING_CACHE),
                identity=identity,
                compute_capabilities=capabilities,
                workspace_mib=chosen.workspace_mib,
                optimization_level=chosen.optimization_level,
                hardware_compatibility=chosen.hardware_compatibility,
                flags=chosen.builder_flags(ahead_of_time=self._ahead_of_time),
            )
            build_engine(job, functools.partial(progress, f"building {name}"))
        return gpu

    def engine_file(self, record: GraphRecord) -> str:
        """The engine in the target's folder."""
        return f"{self.name}/{Path(record.file).stem}{ENGINE_SUFFIX}"

    def reads(self, manifest: Manifest, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The engines and what is written down beside them; of the bundle only what puts stripped weights back."""
        engines = [Path(self.engine_file(graph)) for graph in manifest.graphs.values()]
        names = (str(path) for engine in engines for path in (engine, engine.with_suffix(".json")))
        stripped = self._options(options).strip_weights
        return (*names, *manifest.graphs_by_file(), f"{ONNX_FOLDER}/{WEIGHTS}") if stripped else tuple(names)

    def check(self, bundle: Path, target: TargetManifest) -> None:
        """Compare version and GPU with what the target was built for."""
        version, options = self.version(), self._options(target.options)
        command = f"tc-deploy build {bundle} --backend {self.name}"
        where = bundle / self.name
        if not _is_version_fit(version, target.backend_version, options):
            raise BackendError(
                f"{where}: built with {self.name} {target.backend_version}, found {version} here;"
                f" install that version or build again with: {command}"
            )
        _check_gpu(where, self._cuda().gpu(), target.gpu, options, command)

    def open(self, options: Mapping[str, Any]) -> TrtDevice:
        """Open the GPU; all options but ``use_cuda_graph`` have gone into the engines."""
        trt = self._import()
        errors: list[str] = []
        logger = _logger(trt, errors)
        return TrtDevice(
            self.name,
            trt.Runtime(logger),
            self._cuda(),
            errors,
            user_managed=trt.ExecutionContextAllocationStrategy.USER_MANAGED,
            use_cuda_graph=self._options(options).use_cuda_graph,
            rtx=RtxExtras(trt) if self._ahead_of_time else None,
            refit=functools.partial(_refit, trt, logger),
        )

    def _import(self) -> Any:
        return imported(self._module)

    def _options(self, options: Mapping[str, Any]) -> TensorRtOptions:
        return checked_options(self.name, options, ahead_of_time=self._ahead_of_time)

    def _capability_names(self, options: TensorRtOptions) -> tuple[str, ...]:
        """Compute capabilities as the module names them."""
        if not options.compute_capability:
            return ()
        members = self._import().ComputeCapability.__members__
        known = {f"{name[2:-1]}.{name[-1]}": name for name in members if name.startswith("SM")}
        for capability in options.compute_capability:
            if capability not in known:
                raise UsageError(
                    f"{self.name} {self.version()} builds for compute capabilities {', '.join(known)},"
                    f" found {capability}"
                )
        return tuple(known[capability] for capability in options.compute_capability)

    def _earlier_target(self, bundle: Path) -> TargetManifest | None:
        """The target that is being replaced, if it is whole; of whatever export, as each engine says what it is of."""
        try:
            target = read_document(TargetManifest, bundle / self.name / MANIFEST, "engine", "tc-deploy build")
            check_files(bundle / self.name, target.files)
        except BundleError:
            return None
        return target


def _profiles(graphs: Mapping[str, GraphRecord]) -> tuple[ProfileRecord, ...]:
    """One for each set of sizes that the graphs of a file have."""
    names: dict[tuple[tuple[TensorRecord, ...], tuple[TensorRecord, ...]], list[str]] = {}
    for name, graph in graphs.items():
        names.setdefault((graph.inputs, graph.outputs), []).append(name)
    return tuple(
        ProfileRecord(graphs=tuple(alike), inputs=inputs, outputs=outputs) for (inputs, outputs), alike in names.items()
    )


def _is_built(engine: Path, identity: EngineIdentity) -> bool:
    try:
        record = read_engine_record(engine)
    except BundleError:
        return False
    return EngineIdentity(**record.model_dump(include=set(EngineIdentity.model_fields))) == identity


def _is_version_fit(found: str, built: str, options: TensorRtOptions) -> bool:
    """Whether this version may load an engine; of its own major version a later one may, if it was built for that."""
    if not options.version_compatible:
        return found == built
    numbers = [tuple(int(part) for part in version.split(".") if part.isdigit()) for version in (found, built)]
    return numbers[0][:1] == numbers[1][:1] and numbers[0] >= numbers[1]


def _check_gpu(where: Path, found: GpuRecord, built: GpuRecord | None, options: TensorRtOptions, command: str) -> None:
    """Check that an engine may run on a GPU.

    Raises:
        BackendError: it was built for others.
    """
    if options.hardware_compatibility == "ampere-plus" and int(found.compute_capability.split(".")[0]) >= AMPERE:
        return
    if built is not None:
        capabilities: tuple[str, ...] = (built.compute_capability,)
    elif options.compute_capability:
        capabilities = options.compute_capability
        command += f" --compute-capability {','.join((*capabilities, found.compute_capability))}"
    else:
        return  # Ampere and later, which the deserialiser knows best
    if found.compute_capability not in capabilities:
        raise BackendError(
            f"{where}: built for compute capability {', '.join(capabilities)}, but this machine's {found.name} has"
            f" {found.compute_capability}; build again with: {command}"
        )


def _refit(trt: Any, logger: Any, engine: Any, onnx: Path) -> bool:
    refitter = trt.Refitter(engine, logger)
    return bool(trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(onnx)) and refitter.refit_cuda_engine())


def _logger(trt: Any, errors: list[str]) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, for our own messages."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                errors.append(first_line(message))

    return Logger()
