"""What a plan or a bundle is, in plain values: for people through the command line, for programs as JSON.

In: a folder. Out: one dictionary of JSON values; and of a plan, in a sentence each, how good it was measured to be and
what speaks against it. A bundle's files are checked against their checksums on the way, so what is shown is what is
there. Never: loads an engine or a model.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from tc_deploy.backends.arena import ALIGNMENT_BYTES
from tc_deploy.bundle import MANIFEST, check_files, reading, sha256_of_file
from tc_deploy.consistency import read_documents
from tc_deploy.errors import BundleError, UsageError, counted
from tc_deploy.golden import sampled_on_in_words
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    ENGINE_SUFFIX,
    MODEL_BATCH,
    PROLOGUE_GRAPHS,
    PROLOGUE_ROLES,
    SOLVER,
    Manifest,
    Role,
    TargetManifest,
    check_is_whole,
    read_engine_record,
    read_target,
    variant_name,
)
from tc_deploy.onnx_files import weights_of
from tc_deploy.plan import PLAN, PLAN_FOLDER, Plan, load_plan
from tc_deploy.remarks import remark_on, saves_steps
from tc_deploy.runtime.buffers import Kind
from tc_deploy.runtime.layout import checked_batch_size, itemsize, pipeline_layout, pipeline_programs
from tc_deploy.schedule import FULL, PHASES
from tc_deploy.tolerances import LARGEST_PSNR_DB


def measurement_of(plan: Plan) -> str | None:
    """What calibration measured, as one line; None where it did not."""
    found = plan.measured
    if found is None:
        return None
    exact, seeds = found.converged, f"in PyTorch, on {counted(len(found.seeds), 'unseen seed')}"
    words = f"{decibels(found.psnr_db)} to the full run"
    if exact is None:
        words += f" {seeds}"
    else:
        words = (
            f"{decibels(exact.psnr_db)} to the converged run of {exact.steps} steps {seeds}, where the full run has"
            f" {decibels(exact.full_psnr_db)}; {words}"
        )
    if not saves_steps(plan):
        return words
    cost = f"{counted(found.fewer_steps, 'full step')}, its cost of {plan.cost_in_full_steps():.1f} rounded up"
    if exact is None:
        return f"{words}; {cost}: {decibels(found.fewer_steps_psnr_db)}"
    return f"{words}; {cost}: {decibels(exact.fewer_steps_psnr_db)} to the converged run"


def decibels(psnr_db: float) -> str:
    """A PSNR in words; from 140 dB on two results are equal, as far as fp32 can tell."""
    return "equal" if psnr_db >= LARGEST_PSNR_DB else f"{psnr_db:.1f} dB"


def departure(graph: str, max_abs_error: float | None, init_noise_sigma: float) -> str:
    """How far a graph was from its reference after export, in words."""
    if max_abs_error is None:
        return "not compared"
    if graph == SOLVER:
        return (
            f"at most {max_abs_error:.1e} from diffusers' scheduler over a run (latents begin with deviation"
            f" {init_noise_sigma:.3g})"
        )
    return f"at most {max_abs_error:.1e} from PyTorch"


def inspect_path(path: Path, batch_size: int | None = None) -> dict[str, Any]:
    """Describe a plan folder or a bundle.

    Args:
        path: the folder.
        batch_size: samples that run together, for a bundle's device memory; None takes the bundle's own, or 1.

    Returns:
        ``kind`` is ``plan`` or ``bundle``; a bundle holds its plan's description under ``plan``.

    Raises:
        UsageError: the batch size does not fit the bundle, or is given for a plan.
        BundleError: the folder is neither, or a file in it is missing, truncated or altered.
        PlanError: the plan is inconsistent.
    """
    with reading(path, BUNDLE_FOLDER), reading(path, PLAN_FOLDER):
        return _inspected(path, batch_size)


def _inspected(path: Path, batch_size: int | None) -> dict[str, Any]:
    if (path / MANIFEST).is_file():
        return _bundle(path, batch_size)
    if batch_size is not None:
        raise UsageError(f"{path}: a plan has no buffers; leave --batch-size out, or give a bundle engines/NAME")
    check_is_whole(path)
    if (path / PLAN).is_file():
        return {"kind": "plan", "path": str(path), **_plan(load_plan(path)[0], path)}
    raise BundleError(f"{path}: neither {PLAN} nor {MANIFEST} in it; give a folder calibration/NAME or engines/NAME")


def _plan(plan: Plan, folder: Path) -> dict[str, Any]:
    schedule = plan.run_schedule()
    return {
        "plan_sha256": sha256_of_file(folder / PLAN),
        "model": plan.model.model_dump(mode="json"),
        "scheduler": plan.sampling.scheduler_class,
        "guidance_scale": plan.sampling.guidance_scale,
        "schedule": schedule.line(),
        "steps": schedule.steps,
        **({} if schedule.rule is None else dataclasses.asdict(schedule.rule)),
        "steps_full": schedule.full_steps,
        "steps_cached": schedule.steps - schedule.full_steps,
        "reuse": plan.cache.reuse.value,
        "attention": plan.cache.attention.value,
        "forecast_order": plan.cache.forecast_order,
        "forecast_fitted_on": None if plan.forecast is None else plan.forecast.samples,
        "fit_target": None if plan.forecast is None else plan.forecast.target,
        "fit_target_in_words": None if plan.forecast is None else plan.forecast.target_in_words,
        "solver_fitted": plan.solver_fitted,
        "keep_counts": {f"phase {phase}": list(plan.keep_counts(phase)) for phase in PHASES},
        "cost_in_full_steps": round(plan.cost_in_full_steps(), 3),
        "cost_ratio": round(plan.cost_ratio(), 4),
        "full_gflops": round(plan.cost.full_flops / 1e9, 4),
        "origin": plan.origin.method,
        "seed": plan.origin.seed,
        "conditions": plan.origin.model_dump(mode="json").get("conditions"),
        "measured_in_words": measurement_of(plan),
        "remark": remark_on(plan),
        "measured": None if plan.measured is None else plan.measured.model_dump(mode="json", exclude={"seeds"}),
    }


def _engines(folder: Path, target: TargetManifest) -> dict[str, Any]:
    """What was written down about engines that were built ahead of their use, by graph."""
    engines = {}
    for name, file in target.files.items():
        if name.endswith(ENGINE_SUFFIX):
            record = read_engine_record(folder / name)
            engines[name.removesuffix(ENGINE_SUFFIX)] = {
                "size_bytes": file.size_bytes,
                "graphs": sorted(graph for profile in record.profiles for graph in profile.graphs),
                **record.model_dump(mode="json", include={"axes", "layers", "build_s", "peak_memory_mib", "warnings"}),
            }
    return engines


def _memory(manifest: Manifest, plan: Plan, batch_size: int | None) -> dict[str, Any]:
    """What a pipeline asks a device for, beside its engines: every buffer with its place."""
    batch_size = checked_batch_size(manifest, batch_size)
    layout = pipeline_layout(manifest, pipeline_programs(manifest, plan), batch_size)
    by_kind = {kind: [one.size_bytes for one in layout.buffers if one.key.kind is kind] for kind in Kind}
    return {
        "batch_size": batch_size,
        "size_bytes": layout.size_bytes,
        "alignment_bytes": ALIGNMENT_BYTES,
        "by_kind": {
            kind.value: {"buffers": len(sizes), "size_bytes": sum(sizes)} for kind, sizes in by_kind.items() if sizes
        },
        "buffers": [
            {
                "name": str(one.key),
                "kind": one.key.kind.value,
                "dtype": one.tensor.dtype,
                "shape": list(one.shape),
                "offset_bytes": one.offset_bytes,
                "size_bytes": one.size_bytes,
            }
            for one in layout.buffers
        ],
    }


def _prologue(manifest: Manifest, plan: Plan, path: Path) -> dict[str, Any] | None:
    """What has left the steps' graphs, and what they read instead; None where nothing has."""
    if not manifest.has_prologue:
        return None
    full = variant_name(FULL)
    weights = {
        name: weights_of(path / graph.file)
        for name, graph in manifest.graphs.items()
        if name in (*PROLOGUE_GRAPHS, full)
    }
    left: dict[int, tuple[int, int]] = {}
    for name in PROLOGUE_GRAPHS:
        left |= weights.get(name, {})
    moved = {place: sizes for place, sizes in left.items() if place not in weights[full]}
    moved_bytes, parameters = (sum(sizes[which] for sizes in moved.values()) for which in (0, 1))
    full_bytes = sum(size_bytes for size_bytes, _ in weights[full].values())
    axes = manifest.batch_axes(1)
    row_bytes = {
        role: sum(
            itemsize(tensor) * math.prod((axes[MODEL_BATCH], *tensor.shape_at(axes)[1:]))
            for tensor in manifest.graphs[full].inputs
            if tensor.role is role
        )
        for role in PROLOGUE_ROLES
    }
    return {
        "parameters": parameters,
        "weights_bytes": moved_bytes,
        "share_of_weights": round(moved_bytes / (moved_bytes + full_bytes), 4),
        "bytes_per_step": sum(row_bytes.values()),
        "table_bytes": row_bytes[Role.PROLOGUE] + plan.schedule.steps * row_bytes[Role.SCHEDULED],
    }


def _bundle(path: Path, batch_size: int | None) -> dict[str, Any]:
    documents = read_documents(path)
    manifest, plan = documents.manifest, documents.plan
    targets = {}
    for file in sorted(path.glob(f"*/{MANIFEST}")):
        name = file.parent.name
        try:
            target = read_target(path, name)
            check_files(path / name, target.files)
            targets[name] = {
                "version": target.backend_version,
                "precision": target.computes_in,
                "options": target.options,
                "options_in_words": target.options_in_words,
                "gpu": None if target.gpu is None else target.gpu.model_dump(mode="json"),
                "engines": _engines(path / name, target),
                "usable": True,
            }
        except BundleError as error:
            targets[name] = {"usable": False, "why": str(error)}
    return {
        "kind": "bundle",
        "path": str(path),
        "made_by": manifest.made_by,
        "precision": manifest.precision,
        "fp32_blocks": list(manifest.fp32_blocks),
        "batch_size": manifest.batch_size,
        "pixels": manifest.pixels,
        "sampled_on": sampled_on_in_words(manifest.sampled_on, manifest.batch_size or 1),
        "latent_shape": list(manifest.latent_shape),
        "init_noise_sigma": manifest.solver.init_noise_sigma,
        "conditions": [condition.model_dump(mode="json") for condition in manifest.conditions],
        "decoder": None if manifest.decoder is None else manifest.decoder.model_dump(mode="json"),
        "text": None if manifest.text is None else manifest.text.model_dump(mode="json"),
        "graphs": {
            name: {
                "file": graph.file,
                "inputs": len(graph.inputs),
                "outputs": len(graph.outputs),
                "max_abs_error": graph.max_abs_error,
                "snr_to_fp32_db": graph.snr_to_fp32_db,
            }
            for name, graph in manifest.graphs.items()
        },
        "prologue": _prologue(manifest, plan, path),
        "files": {name: record.model_dump() for name, record in manifest.files.items()},
        "targets": targets,
        "memory": _memory(manifest, plan, batch_size),
        "plan": _plan(plan, path),
    }
