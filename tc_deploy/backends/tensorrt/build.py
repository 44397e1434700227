"""One ONNX graph to one TensorRT engine, in a process of its own.

In: a job, which names an ONNX file that has been checked. Out: ``NAME.engine``, ``NAME.json`` (an
:class:`~tc_deploy.manifest.EngineRecord`) and ``NAME.log``, what the builder said. A process of its own, because the
builder is native code whose peak of memory ends with its process, and which after some failures builds no more
(measured with TensorRT-RTX 1.7). Engines are not reproducible byte for byte: what one is made from tells it apart.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tc_deploy.bundle import Document, canonical_json
from tc_deploy.errors import BackendError, first_line
from tc_deploy.hardware import peak_memory_mib
from tc_deploy.manifest import EngineIdentity, EngineRecord, ProfileRecord

PERCENT, ERROR = "percent", "error"
"""First words of the lines that the builder's process writes."""


class EngineJob(Document):
    """One engine to build."""

    module: str
    """``tensorrt`` or ``tensorrt_rtx``."""
    onnx: str
    engine: str
    """The file to write; its record and log go beside it."""
    timing_cache: str | None
    """A file that speeds up the next build; TensorRT-RTX has no use for one."""
    identity: EngineIdentity
    compute_capabilities: tuple[str, ...]
    """As the module names them: ``SM89``; none leaves the choice to it."""
    workspace_mib: int | None
    optimization_level: int | None
    hardware_compatibility: str | None
    """A member of the module's ``HardwareCompatibilityLevel``, in our spelling."""
    flags: tuple[str, ...]
    """Members of the module's ``BuilderFlag``."""


def build_engine(job: EngineJob, progress: Callable[[int, int], None]) -> None:
    """Run a job in a process of its own, and wait for it.

    Args:
        job: what to build.
        progress: told how much is done, and of how much.

    Raises:
        BackendError: the builder refuses the graph, or its process dies.
    """
    log = Path(job.engine).with_suffix(".log")
    error = None
    progress(0, 100)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as text, log.open("w", encoding="utf-8") as said:
        text.write(job.model_dump_json())
        text.seek(0)
        with subprocess.Popen(  # noqa: S603 - this Python, fixed words
            [sys.executable, "-m", __name__], stdin=text, stdout=subprocess.PIPE, stderr=said, encoding="utf-8"
        ) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    word, _, rest = line.rstrip("\n").partition(" ")
                    if word == PERCENT:
                        progress(int(rest), 100)
                    elif word == ERROR:
                        error = rest
            except BaseException:
                worker.kill()
                raise
    if worker.returncode:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"])[-1]
        reason = error or f"its process ended with code {worker.returncode} (-9: out of memory?): {last}"
        raise BackendError(f"{job.onnx}: {job.module} builds no engine: {reason}")


class PhaseTree:
    """The builder's nested phases as one percentage that never falls.

    Its monitor may be called from several threads.
    """

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        """By name: parent, number of steps, steps done."""
        self._percent = 0
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps has begun inside ``parent``, or at the top."""
        with self._lock:
            self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> int:
        """Step ``step`` of a phase is done.

        Returns:
            The percentage of the whole.
        """
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, step + 1)
            tops = [self._share(name) for name, (parent, *_) in self._phases.items() if parent not in self._phases]
            self._percent = max(self._percent, int(100 * max(tops, default=0)))
            return self._percent

    def finish(self, phase: str) -> None:
        """A phase has ended."""
        with self._lock:
            self._phases.pop(phase, None)

    def _share(self, phase: str) -> float:
        _, steps, done = self._phases[phase]
        inside = max((self._share(name) for name, (parent, *_) in self._phases.items() if parent == phase), default=0)
        return min(1.0, (done + inside) / steps)


def _main() -> int:
    """The builder's process: a job on stdin, percentages and an error on stdout, the log on stderr."""
    job = EngineJob.model_validate_json(sys.stdin.read())
    try:
        _build(job)
    except BackendError as error:
        _say(ERROR, error)
        return error.exit_code
    return 0


def _say(word: str, rest: object) -> None:
    sys.stdout.write(f"{word} {rest}\n")
    sys.stdout.flush()


def _build(job: EngineJob) -> None:
    trt: Any = importlib.import_module(job.module)
    start_s = time.perf_counter()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # TensorRT 11 and TensorRT-RTX know no other networks than strongly typed ones; TensorRT 10 must be told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # By its path, so that weights.bin is found beside it wherever this process stands.
    if not parser.parse_from_file(job.onnx) or parser.num_errors:
        raise BackendError(first_line(parser.get_error(0).desc()))
    config = builder.create_builder_config()
    monitor = _monitor(trt)
    config.progress_monitor = monitor
    configure(trt, config, job)
    if job.identity.axes or len(job.identity.profiles) > 1:
        for profile in job.identity.profiles:
            config.add_optimization_profile(_profile(builder, profile, job.identity.axes))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(logger.errors[0] if logger.errors else "it gives no reason")
    path = Path(job.engine)
    path.write_bytes(plan)
    if job.timing_cache is not None:
        Path(job.timing_cache).write_bytes(config.get_timing_cache().serialize())
    record = EngineRecord(
        **job.identity.model_dump(),
        layers=network.num_layers,
        build_s=round(time.perf_counter() - start_s, 3),
        peak_memory_mib=peak_memory_mib(),
        warnings=tuple(dict.fromkeys(logger.warnings)),
    )
    path.with_suffix(".json").write_text(canonical_json(record.model_dump(mode="json")), encoding="utf-8")
    _say(PERCENT, 100)


def configure(trt: Any, config: Any, job: EngineJob) -> None:
    """Set a builder's configuration as a job says."""
    if job.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_mib * 2**20)
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.hardware_compatibility is not None:
        level = job.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    # TensorRT takes fp32 products for TF32 if nobody says otherwise, and a bundle says fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in job.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for index, name in enumerate(job.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if job.timing_cache is not None:
        known = Path(job.timing_cache)
        cache = config.create_timing_cache(known.read_bytes() if known.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)


def _profile(builder: Any, record: ProfileRecord, axes: Mapping[str, tuple[int, int, int]]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in record.inputs:
        shapes = (tensor.shape_at({axis: sizes[which] for axis, sizes in axes.items()}) for which in range(3))
        profile.set_shape(tensor.name, *shapes)
    return profile


def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Everything but the details goes to stderr; errors and warnings are kept."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level == severity.VERBOSE:
                return
            sys.stderr.write(f"{level.name.lower()}: {message}\n")
            if level == severity.WARNING:
                self.warnings.append(message)
            elif level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(first_line(message))

    return Logger()


def _monitor(trt: Any) -> Any:
    tree = PhaseTree()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the parent process how far the build is."""

        def __init__(self) -> None:
            super().__init__()
            self._told = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            tree.start(phase, parent, steps)

        def phase_finish(self, phase: str) -> None:
            tree.finish(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            percent = tree.step(phase, step)
            if percent > self._told:
                self._told = percent
                _say(PERCENT, percent)
            return True  # go on

    return Monitor()


if __name__ == "__main__":
    sys.exit(_main())
