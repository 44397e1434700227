"""Export: a plan and its checkpoint to a bundle ``engines/NAME``.

Reads ``plan.json`` and ``tables.safetensors``, writes ``onnx/{full,cached-1,cached-2,solver}.onnx`` (or ``steps.onnx``
in the place of those that run the model), one ``onnx/weights.bin`` that all of them refer to, the tables that the
runtime reads, ``polygraphy/`` with samples to validate engines by, and ``manifest.json`` last; where it is asked to,
the pipeline's decoder and text encoders too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from tc_deploy import __version__
from tc_deploy.bundle import check_replaceable, file_records, new_folder, relative_path
from tc_deploy.errors import UsageError
from tc_deploy.export.options import ExportOptions
from tc_deploy.export.parts import ExportedParts, PipelineParts
from tc_deploy.export.steps import ExportedSteps, exported_steps
from tc_deploy.golden import write_golden
from tc_deploy.groups import token_groups
from tc_deploy.hardware import check_fits_memory
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    FORMAT_VERSION,
    ONNX_FOLDER,
    RUNTIME_TABLES,
    WEIGHTS,
    ConditionRecord,
    LoraRecord,
    Manifest,
    SolverRecord,
    write_manifest,
)
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry
from tc_deploy.models.solver import SolverTable
from tc_deploy.plan import (
    PLAN,
    TABLES,
    Plan,
    PromptsRecord,
    TextsRecord,
    content_sha256,
    load_plan,
    places_read,
    write_plan_files,
)
from tc_deploy.planned.model import model_of_plan
from tc_deploy.remarks import warn_of_plan
from tc_deploy.tokencache.cost import check_cost
from tc_deploy.types import FloatArray


def export_bundle(
    plan_folder: Path,
    destination: Path,
    options: ExportOptions | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Export a plan's graphs.

    Args:
        plan_folder: ``calibration/NAME``.
        destination: ``engines/NAME``; one that exists is replaced, with the engines that were built from it.
        options: how; None takes every default.
        progress: told what is being done.

    Raises:
        PlanError: the plan is malformed, or was made for another checkpoint.
        ModelError: the checkpoint or a part of the pipeline is missing or cannot be loaded.
        ExportError: a graph or the scheduler cannot be exported, a graph departs from PyTorch, or a product overflows.
        BackendError: the engine that the check runs in is not installed.
        StorageError: the destination cannot be written, is not ours to replace, or another process is writing it.
        OutOfMemoryError: the machine's does not suffice for such a batch.
        UsageError: there is no block of a name, the bundle to take graphs from holds other graphs, the plan has nothing
            to make one graph of, or the model has no use for a decoder or a text encoder.
    """
    options = options or ExportOptions()
    reads = [*places_read(plan_folder), *(path for path in (options.model_path, options.pipeline_path) if path)]
    plan, tables = load_plan(plan_folder)
    check_replaceable(destination, BUNDLE_FOLDER, reads=reads)
    _check_plan_allows(plan, plan_folder, options)
    warn_of_plan(plan, plan_folder)
    progress("loading the checkpoint")
    model = model_of_plan(plan, str(plan_folder), options.model_path, options.variant, options.loras)
    check_cost(plan, model, str(plan_folder))
    family, geometry = model.family, model.geometry
    parts = PipelineParts(
        options.pipeline_path or options.model_path or Path(plan.model.source),
        family,
        geometry,
        decoder=options.with_decoder,
        text_encoder=options.with_text_encoder,
        variant=options.variant or plan.model.variant,
        progress=progress,
    )
    with new_folder(destination, BUNDLE_FOLDER) as folder:
        (folder / ONNX_FOLDER).mkdir()
        steps = exported_steps(model, plan, tables, folder, str(plan_folder), options, progress)
        # The transformer's memory is free before an autoencoder or a text encoder takes some.
        del model
        made = parts.export(
            folder,
            batch_size=options.batch_size,
            trajectory=steps.trajectory,
            check=options.check,
            progress=progress,
        )
        sample_files = _write_samples(steps, made, folder)
        write_plan_files(plan, tables, folder, destination)
        (folder / RUNTIME_TABLES).write_bytes(safetensors.numpy.save(runtime_tables_of(steps.solver)))
        manifest = _manifest(plan, family, geometry, steps, made, sample_files, folder, destination, options)
        write_manifest(manifest, folder)
    return manifest


def _check_plan_allows(plan: Plan, where: Path, options: ExportOptions) -> None:
    """Check what is asked for against the plan, before the checkpoint is loaded.

    Raises:
        OutOfMemoryError: the machine's does not suffice for such a batch.
        UsageError: the plan has nothing to make one graph of.
    """
    if options.batch_size is not None:
        # One value of a token in each block, of which a step makes several.
        rows = options.batch_size * (1 if plan.sampling.guidance_scale is None else 2)
        size_bytes = 4 * rows * max(plan.model.blocks, 1) * plan.model.tokens * plan.model.width
        check_fits_memory(size_bytes, f"a static batch of {options.batch_size}")
    if options.one_graph and not token_groups(plan.cache, plan.phases_used(), plan.model.tokens):
        raise UsageError(
            f"{where}: no cached step of the plan runs the model on some of the tokens, so there is nothing to"
            " make one graph of; leave --one-graph out"
        )


def _write_samples(steps: ExportedSteps, made: ExportedParts, folder: Path) -> list[str]:
    """Write what engines are validated by, where some was left; returns the files' names."""
    if steps.trajectory is None:
        return []
    more = {name: part.samples for name, part in made.graphs.items() if part.samples is not None}
    return write_golden(steps.samples | more, steps.trajectory, folder)


def _manifest(
    plan: Plan,
    family: Family,
    geometry: Geometry,
    steps: ExportedSteps,
    made: ExportedParts,
    sample_files: Sequence[str],
    folder: Path,
    destination: Path,
    options: ExportOptions,
) -> Manifest:
    """What the bundle says of itself, once all its files lie in ``folder``."""
    records = steps.records | {name: part.graph for name, part in made.graphs.items()}
    names = [
        PLAN,
        TABLES,
        RUNTIME_TABLES,
        *dict.fromkeys(record.file for record in records.values()),
        f"{ONNX_FOLDER}/{WEIGHTS}",
        *(item.file for item in (made.text.tokenizers if made.text else ())),
        *sample_files,
    ]
    return Manifest(
        kind="bundle",
        format_version=FORMAT_VERSION,
        made_by=f"tc-deploy {__version__}",
        plan_sha256=content_sha256(plan),
        precision=options.precision,
        fp32_blocks=tuple(sorted(options.fp32_blocks)),
        batch_size=options.batch_size,
        latent_shape=geometry.latent_shape,
        pixels=geometry.pixels,
        conditions=tuple(
            ConditionRecord(name=item.name, dtype=item.dtype, shape=item.shape, classes=item.classes)
            for item in geometry.conditions
        ),
        loras=tuple(LoraRecord(file=lora.path.name, sha256=lora.sha256, scale=lora.scale) for lora in options.loras),
        sampled_on=_said_in(destination, steps.sampled_on),
        solver=SolverRecord(
            history=steps.solver.history,
            init_noise_sigma=steps.solver.init_noise_sigma,
            guidance_scale=plan.sampling.guidance_scale,
            guidance_rule=plan.sampling.guidance_rule,
            true_cfg=family.convention.true_cfg,
            embedded_guidance=_embedded_guidance(plan, family, geometry),
        ),
        graphs=records,
        decoder=made.decoder,
        text=made.text,
        files=file_records(folder, names),
    )


def _said_in(
    bundle: Path, record: PromptsRecord | TextsRecord | Literal["random", "labels"]
) -> PromptsRecord | TextsRecord | Literal["random", "labels"]:
    """What was sampled on, its path as documents in the bundle say it."""
    if not isinstance(record, PromptsRecord):
        return record
    return record.model_copy(update={"file": relative_path(record.file, bundle)})


def _embedded_guidance(plan: Plan, family: Family, geometry: Geometry) -> float | None:
    """What a model whose guidance is distilled is told by default: the plan's strength, or the pipeline's."""
    chosen = plan.sampling.embedded_guidance
    if not geometry.embeds_guidance:
        return None
    return family.convention.embedded_guidance if chosen is None else chosen


def runtime_tables_of(solver: SolverTable) -> dict[str, FloatArray]:
    """A solver as the runtime reads it, by the tables' names."""
    return {
        "coefficients": solver.coefficients,
        "init_noise_sigma": np.array([solver.init_noise_sigma], np.float32),
        "input_scale": solver.input_scale,
        "timesteps": solver.timesteps,
    }
