"""Validate: a built target against what PyTorch did when its bundle was exported, or against another engine.

In: ``engines/NAME`` with a target. Out: a :class:`~tc_deploy.validate.record.ValidationRecord`. Compares every graph on
inputs as they occur, runs the whole trajectory, checks what every step reads, and looks for who is to blame where
something fails. Never: writes into the bundle.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.backends.base import loaded_graphs
from tc_deploy.backends.load import load_target
from tc_deploy.bundle import MANIFEST, reading, real_path, sha256_of_file
from tc_deploy.errors import BackendError, TcDeployError
from tc_deploy.golden import Feed, GoldenGraph, Trajectory, read_golden, sampled_on_in_words
from tc_deploy.hardware import hardware_line
from tc_deploy.libraries import load_failure
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    FP32_GRAPHS,
    PROLOGUE_ROLES,
    SOLVER,
    TABLE_ROLES,
    Manifest,
    Role,
    TargetManifest,
    read_target,
    variant_name,
)
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.schedule import FULL, PHASES
from tc_deploy.types import FloatArray, Precision
from tc_deploy.validate.blame import EngineSearch, ExportSearch, blame, onnxruntime_outputs
from tc_deploy.validate.drift import Excess, Runs, drift_of, excesses, image_failures
from tc_deploy.validate.marking import MarkableGraph
from tc_deploy.validate.metrics import is_close, metrics_of
from tc_deploy.validate.record import (
    FORMAT_VERSION,
    BlameRecord,
    RepeatRecord,
    ValidationRecord,
    VariantRecord,
)
from tc_deploy.validate.runners import BackendRunner, TorchRunner
from tc_deploy.validate.trajectory import Engines, Recorder, run_trajectory
from tc_deploy.validate.variants import compare_graph
from tc_deploy.validate.wiring import wiring_faults

if TYPE_CHECKING:
    from tc_deploy.validate.checkpoint import Checkpoint

RECORDED, TORCH, ONNXRUNTIME = "recorded", "torch", "onnxruntime"
"""What a target is compared with, beside the bundle's other targets: what PyTorch made at export, PyTorch anew, and
polygraphy's own ONNX Runtime."""

_OWN_PRECISION = {"openvino": {"precision": "f32"}}
"""Options by which an engine kind computes as precisely as the graphs say."""
_ISOLATING = {"onnxruntime": "--unfused", "openvino": "--precision f32"}
"""Options of a build without what an engine kind adds to the graphs."""
_SAME_BITS = ("onnxruntime", "openvino")
"""Engine kinds of which the same bits are expected each time, on one machine with as many threads."""
_VARIANTS = {variant_name(variant): variant for variant in (FULL, *PHASES)}


def validate_bundle(
    path: Path,
    backend: str | None = None,
    *,
    against: str = RECORDED,
    model_path: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ValidationRecord:
    """Validate one target of a bundle.

    Args:
        path: ``engines/NAME``.
        backend: which target; None takes the only one.
        against: ``recorded``, ``torch``, ``onnxruntime`` or another of the bundle's targets.
        model_path: the checkpoint, where it is not where the plan says.
        progress: told what is being done.

    Raises:
        BundleError: nothing exported or built there, no samples were left by the export, or a file is missing,
            truncated or altered.
        BackendError: an engine or a library is not installed, the target is for another GPU, or an engine fails.
        ModelError: the checkpoint is wanted and cannot be loaded.
        PlanError: the checkpoint is another than the plan was made for.
        UsageError: there is no such backend, or there are several targets and none is named.
    """
    with reading(path, BUNDLE_FOLDER):
        return _Validation(path, backend, against, model_path, progress).record()


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A graph and the inputs on which it fails."""

    graph: str
    step: int
    feed: Feed
    expected: Feed | None
    """What PyTorch makes of them; None where only the checkpoint can say."""


class _Validation:
    """One validation; see :func:`validate_bundle`."""

    def __init__(
        self, path: Path, backend: str | None, against: str, model_path: Path | None, progress: Callable[[str], None]
    ) -> None:
        self.path, self.against, self.model_path, self.progress = path, against, model_path, progress
        bundle = read_bundle(path, backend, whole=True)
        self.manifest: Manifest = bundle.manifest
        self.plan = bundle.plan
        self.backend = bundle.backend
        self.target: TargetManifest = read_target(path, self.backend)
        if against not in (RECORDED, TORCH):
            registry.backend(against).version()
        self.samples: Mapping[str, GoldenGraph]
        self.samples, self.saved = read_golden(path, self.manifest)
        self.precision = self.target.computes_in
        self.engines: Engines = load_target(path, self.manifest, self.backend)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, when somebody asks for it."""
        try:
            from tc_deploy.validate.checkpoint import Checkpoint
        except Exception as error:
            if (words := load_failure(error)) is None:
                raise
            raise BackendError(f"PyTorch as a reference: {words}") from error
        self.progress("loading the checkpoint")
        return Checkpoint(self.path, self.model_path, self.manifest.precision, self.manifest.fp32_blocks)

    def record(self) -> ValidationRecord:
        trajectory = self.checkpoint.trajectory(self.saved) if self.against == TORCH else self.saved
        variants = tuple(self._variant(name) for name in _in_order(self.manifest))
        self.progress("sampling with the engines")
        recorder = Recorder(small=_small(self.manifest))
        (latents,) = self._run(recorder.wrapped(self.engines))
        faults = wiring_faults(recorder.calls, recorder.made_before, self.manifest.graphs, self.saved, self.plan)
        drift = drift_of(self._runs(latents, trajectory), pixels=self.manifest.pixels)
        found = excesses(drift, self.backend, self.manifest.precision, self.precision)
        blamed = self._blame(variants, found)
        words = [self._excess_words(excess, blamed) for excess in found]
        words += image_failures(drift, self.backend, self.precision)
        drift = drift.model_copy(update={"exceeded": tuple(words)})
        repeats = self._repeats(latents)
        passed = all(variant.passed for variant in variants) and all(repeat.passed for repeat in repeats)
        return ValidationRecord(
            kind="validation",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            hardware=hardware_line(),
            bundle=real_path(self.path).name,
            manifest_sha256=sha256_of_file(self.path / MANIFEST),
            backend=self.backend,
            backend_version=self.target.backend_version,
            precision=self.precision,
            against=self.against,
            sampled_on=sampled_on_in_words(self.manifest.sampled_on, len(self.saved.noise)),
            passed=passed and not faults and not words,
            variants=variants,
            wiring=faults,
            drift=drift,
            blame=blamed,
            repeats=repeats,
        )

    def _variant(self, name: str) -> VariantRecord:
        self.progress(f"comparing {name}")
        record = self.manifest.graphs[name]
        device, graphs = self.engines
        target = BackendRunner(lambda: (device, graphs[name]), record, f"{self.backend} (target)")
        reference = self._reference(name)
        return compare_graph(name, self.samples[name], target, reference, self.backend, self._precision_of(name))

    def _precision_of(self, name: str) -> str:
        """What the target computes a graph in."""
        return _precision_in(name, self.precision)

    def _reference(self, name: str) -> BaseRunner | None:
        record = self.manifest.graphs[name]
        # Of what is no step of the model, the recorded samples are the reference: diffusers' scheduler, autoencoder and
        # text encoders made them.
        if self.against == RECORDED or (self.against == TORCH and name not in _VARIANTS):
            return None
        if self.against == TORCH:
            return TorchRunner(partial(self.checkpoint.outputs, _VARIANTS[name]), record)
        if self.against == ONNXRUNTIME:
            return OnnxrtRunner(SessionFromOnnx(str(self.path / record.file)), name="onnxruntime (polygraphy)")
        device, graphs = self._other_engines
        return BackendRunner(lambda: (device, graphs[name]), record, f"{self.against} (reference)")

    @cached_property
    def _other_engines(self) -> Engines:
        return load_target(self.path, self.manifest, self.against)

    def _run(self, engines: Engines, times: int = 1) -> list[FloatArray]:
        return run_trajectory(self.path, self.backend, engines, self.saved, times=times)

    def _runs(self, latents: FloatArray, trajectory: Trajectory) -> Runs:
        """The chain of runs that the drift is read off."""
        onnxruntime = own = None
        if self.backend != ONNXRUNTIME and _why_missing(ONNXRUNTIME) is None:
            self.progress("sampling with ONNX Runtime")
            (onnxruntime,) = self._run(self._opened(ONNXRUNTIME, {}))
        if self.precision != self.manifest.precision and self.backend in _OWN_PRECISION:
            self.progress(f"sampling with {self.backend} in {self.manifest.precision}")
            options = {**self.target.options, **_OWN_PRECISION[self.backend]}
            (own,) = self._run(self._opened(self.backend, options))
        return Runs(
            full=trajectory.full,
            exact=trajectory.exact,
            cached=trajectory.cached,
            onnxruntime=latents if self.backend == ONNXRUNTIME else onnxruntime,
            own_precision=own,
            target=latents,
        )

    def _opened(self, backend: str, options: Mapping[str, object]) -> Engines:
        """The bundle's graphs on an engine kind that compiles them as they are, whether or not it is built here."""
        engine = registry.backend(backend)
        device = engine.open(options)
        files = {name: engine.engine_file(record) for name, record in self.manifest.graphs.items()}
        return device, loaded_graphs(device, self.path, files)

    def _blame(self, variants: tuple[VariantRecord, ...], found: tuple[Excess, ...]) -> tuple[BlameRecord, ...]:
        failures = []
        for variant in variants:
            if variant.passed:
                continue
            sample, number = self.samples[variant.name], variant.steps.index(variant.worst.step)
            step, feed, expected = variant.steps[number], sample.inputs[number], sample.outputs[number]
            failures.append(_Failure(graph=variant.name, step=step, feed=feed, expected=expected))
        if not failures and found:
            failures = self._failures_on_the_way(found[0].step)
        return tuple(self._blamed(failure) for failure in failures)

    def _failures_on_the_way(self, step: int) -> list[_Failure]:
        """The graphs of one step of the target's own run, on what they read there."""
        self.progress(f"looking at what the target reads at step {step}")
        recorder = Recorder(whole_steps={step})
        self._run(recorder.wrapped(self.engines))
        calls = recorder.calls[2 * step : 2 * step + 2]
        return [
            _Failure(graph=call.graph, step=step, feed=dict(call.arrays), expected=None)
            for call in calls
            if call.graph != SOLVER
        ]

    def _blamed(self, failure: _Failure) -> BlameRecord:
        """Say whether the graph or the engine is wrong, then look for the block."""
        self.progress(f"looking for who is to blame in {failure.graph}")
        name, feed = failure.graph, failure.feed

        def unknown(text: str, origin: str = "unknown") -> BlameRecord:
            fields = {"block": None, "module": None, "operators": (), "weights": (), "runs": 0}
            return BlameRecord.model_validate(
                {"graph": name, "step": failure.step, "origin": origin, "text": text, **fields}
            )

        if (why := _why_missing(ONNXRUNTIME)) is not None:
            return unknown(f"to tell export from engine ONNX Runtime is needed: {why}")
        record = self.manifest.graphs[name]
        found = onnxruntime_outputs(self.path / record.file, feed)
        expected, why_not = failure.expected, ""
        variant = _VARIANTS.get(name)
        checkpoint = None
        if variant is not None:
            try:
                checkpoint = self.checkpoint
            except TcDeployError as error:
                why_not = str(error)
        if expected is None and checkpoint is not None and variant is not None:
            expected = checkpoint.outputs(variant, feed)
        with tempfile.TemporaryDirectory(prefix="tc-deploy-blame-") as folder:
            graph = MarkableGraph(self.path, record, Path(folder))
            own = (ONNXRUNTIME, _precision_in(name, self.manifest.precision))
            if expected is not None and not _all_close(found, expected, *own):
                if checkpoint is None or variant is None:
                    cause = f"; to find the block: {why_not}" if why_not else ""
                    return unknown(f"the ONNX graph itself departs from PyTorch{cause}", "export")
                search = ExportSearch(graph, feed, *own, checkpoint, variant)
                return self._with_rebuild(blame(name, failure.step, search, checkpoint))
            device, graphs = self.engines
            runner = BackendRunner(lambda: (device, graphs[name]), record, self.backend)
            with runner:
                made = dict(runner.infer(feed, check_inputs=False))
            if _all_close(made, found, self.backend, self._precision_of(name)):
                return unknown("the graph is right on what it read there; look at what the steps read")
            if registry.backend(self.backend).engine_file(record) != record.file:
                return unknown(
                    "the engine departs from its graph; it is built ahead, so no block was looked for", "engine"
                )
            engine_search = EngineSearch(graph, feed, self.backend, self._precision_of(name), device)
            return self._with_rebuild(blame(name, failure.step, engine_search))

    def _with_rebuild(self, record: BlameRecord) -> BlameRecord:
        """Say by which commands a cause is isolated."""
        commands = []
        if record.origin == "engine" and self.backend in _ISOLATING:
            commands.append(f"tc-deploy build {self.path} --backend {self.backend} {_ISOLATING[self.backend]}")
        if record.block is not None and self.manifest.precision is not Precision.FP32:
            kept = " ".join(f"--fp32-block {block}" for block in (*self.manifest.fp32_blocks, record.block))
            commands.append(f"tc-deploy export PLAN -o {self.path} --precision {self.manifest.precision} {kept}")
        text = "; ".join((record.text, *(f"to isolate it: {command}" for command in commands)))
        return record.model_copy(update={"text": text})

    def _excess_words(self, excess: Excess, blamed: tuple[BlameRecord, ...]) -> str:
        blocks = dict.fromkeys(record.block for record in blamed if record.block is not None)
        return f"{excess}" + (f", by {', '.join(blocks)}" if blocks else "")

    def _repeats(self, latents: FloatArray) -> tuple[RepeatRecord, ...]:
        """The same run twice on a fresh load of the target."""
        self.progress("sampling twice more, to compare bit for bit")
        first, second = self._run(load_target(self.path, self.manifest, self.backend), times=2)
        promised = self.backend in _SAME_BITS
        ahead = any(name.endswith(".engine") for name in self.target.files)
        loads = "two loads of the engines" if ahead else "two loads, which compile the graphs anew"
        pairs = {"two runs of one load": (second, first), loads: (first, latents)}
        return tuple(
            RepeatRecord(
                what=what,
                promised=promised,
                equal=bool(np.array_equal(mine, theirs)),
                max_abs=None if np.array_equal(mine, theirs) else metrics_of(mine, theirs).max_abs,
            )
            for what, (mine, theirs) in pairs.items()
        )


def _precision_in(name: str, precision: str) -> str:
    """What a graph is in, where those of the model are in ``precision``."""
    return Precision.FP32 if name in FP32_GRAPHS else precision


def _in_order(manifest: Manifest) -> list[str]:
    """The graphs, those of the model first."""
    return sorted(manifest.graphs, key=lambda name: (name not in _VARIANTS, _VARIANTS.get(name, 0), name))


def _small(manifest: Manifest) -> set[str]:
    """The inputs that are kept as arrays at every step: rows of tables, conditions and what is made of them."""
    tensors = (tensor for graph in manifest.graphs.values() for tensor in graph.inputs)
    return {tensor.name for tensor in tensors if tensor.role in (*TABLE_ROLES, *PROLOGUE_ROLES, Role.CONDITION)}


def _why_missing(backend: str) -> str | None:
    """What keeps an engine kind away; None where it is there."""
    try:
        registry.backend(backend).version()
    except BackendError as error:
        return str(error)
    return None


def _all_close(found: Feed, expected: Feed, backend: str, precision: str) -> bool:
    return all(is_close(found[name], array, backend, precision) for name, array in expected.items())
