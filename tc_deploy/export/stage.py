"""Export: a plan and its checkpoint to a bundle ``engines/NAME``.

Reads ``plan.json`` and ``tables.safetensors``, writes ``onnx/{full,cached-1,cached-2,solver}.onnx`` (or ``steps.onnx``
in the place of those that run the model), one ``onnx/weights.bin`` that all of them refer to, the tables that the
runtime reads, ``polygraphy/`` with samples to validate engines by, and ``manifest.json`` last; where it is asked to,
the pipeline's decoder and text encoders too.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy
from torch import Tensor

from tc_deploy import __version__
from tc_deploy.bundle import check_replaceable, file_records, new_folder, reading, relative_path
from tc_deploy.consistency import read_documents
from tc_deploy.errors import ExportError, PlanError, UsageError
from tc_deploy.export.check import check_graph, check_solver_graph, example_inputs, snr_to_fp32_db
from tc_deploy.export.graphs import EXAMPLE_BATCH, onnx_from_graph
from tc_deploy.export.parts import PipelineParts
from tc_deploy.export.samples import samples_of
from tc_deploy.export.saving import saved_graph
from tc_deploy.export.solver_graph import solver_model
from tc_deploy.export.weights import WeightsFile
from tc_deploy.figures import other_timesteps
from tc_deploy.groups import token_groups
from tc_deploy.hardware import check_fits_memory
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    FORMAT_VERSION,
    FP32_GRAPHS,
    MODEL_BATCH,
    ONNX_FOLDER,
    RUNTIME_TABLES,
    SOLVER,
    WEIGHTS,
    ConditionRecord,
    GraphRecord,
    Manifest,
    SolverRecord,
    variant_name,
    write_manifest,
)
from tc_deploy.models.family import DiffusionTransformer, Family
from tc_deploy.models.geometry import Geometry
from tc_deploy.models.solver import SolverTable, read_solver
from tc_deploy.plan import (
    PLAN,
    TABLES,
    Plan,
    PromptsRecord,
    content_sha256,
    load_plan,
    places_read,
    write_plan_files,
)
from tc_deploy.planned.model import model_of_plan, sampling_from_plan
from tc_deploy.planned.prompts import prompts_of_plan, sampled_on
from tc_deploy.remarks import warn_of_plan
from tc_deploy.samples import GraphSamples, Trajectory, write_samples
from tc_deploy.schedule import FULL
from tc_deploy.tokencache.cost import check_cost
from tc_deploy.tokencache.graphs import ModelGraph, step_graphs
from tc_deploy.tokencache.precision import half_products, overflow_refused
from tc_deploy.types import FloatArray, IntArray, Precision


def export_bundle(
    plan_folder: Path,
    destination: Path,
    *,
    model_path: Path | None = None,
    batch_size: int | None = None,
    precision: Precision = Precision.FP32,
    fp32_blocks: Collection[str] = (),
    check: bool = True,
    graphs_from: Path | None = None,
    samples: bool = True,
    one_graph: bool = False,
    with_decoder: bool = False,
    with_text_encoder: bool = False,
    pipeline_path: Path | None = None,
    variant: str | None = None,
    conditions: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Export a plan's graphs.

    Args:
        plan_folder: ``calibration/NAME``.
        destination: ``engines/NAME``; one that exists is replaced, with the engines that were built from it.
        model_path: the checkpoint, where it is not where the plan says.
        batch_size: samples per batch to fix in the graphs; None leaves the batch axis dynamic.
        precision: what matrix products, their weights and the caches are in (``tokencache/precision.py``); inputs and
            outputs of the model stay fp32, and so do decoder and text encoders.
        fp32_blocks: names of blocks that stay in fp32 altogether, where ``precision`` is half.
        check: compare every graph with PyTorch, under the same precision.
        graphs_from: a bundle of the same model and the same cache settings, whose full and cached graphs are taken as
            they are: of two plans that differ in schedule or sampler, the second costs no export.
        samples: also write what engines are validated by, unless ``graphs_from`` is given, ``check`` is off, or the
            graphs are in bf16.
        one_graph: make one graph of the variants that run the model, its token counts open, so that an engine holds
            the weights once; each variant is a profile of it.
        with_decoder: also export the decoder of the pipeline's autoencoder.
        with_text_encoder: also export the pipeline's text encoders, and its tokenizers.
        pipeline_path: the folder that holds these; None looks where the checkpoint is.
        variant: which copy of the checkpoint's, the decoder's and the text encoders' weights; None takes the plan's.
        conditions: a file of prompt embeddings to compare graphs on, and to leave samples by, in place of the plan's
            prompts; or ``random``.
        progress: told what is being done.

    Raises:
        PlanError: the plan is malformed, or was made for another checkpoint.
        ModelError: the checkpoint or a part of the pipeline is missing or cannot be loaded.
        ExportError: a graph or the scheduler cannot be exported, a graph departs from PyTorch, or a product overflows.
        BackendError: the engine that the check runs in is not installed.
        StorageError: the destination cannot be written, is not ours to replace, or another process is writing it.
        OutOfMemoryError: the machine's does not suffice for such a batch.
        UsageError: ``batch_size`` is below 1, there is no block of a name, ``graphs_from`` holds other graphs, the
            plan has nothing to make one graph of, or the model has no use for a decoder or a text encoder.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"static batch must be at least 1, found {batch_size}")
    if fp32_blocks and precision is Precision.FP32:
        raise UsageError("in fp32 every block is; --fp32-block goes with --precision fp16 or bf16")
    if pipeline_path is not None and not (with_decoder or with_text_encoder):
        raise UsageError(
            "--pipeline names where decoder and text encoders are; give --with-decoder or --with-text-encoder with it"
        )
    reads = [*places_read(plan_folder), *(path for path in (model_path, pipeline_path) if path is not None)]
    plan, tables = load_plan(plan_folder)
    check_replaceable(destination, BUNDLE_FOLDER, reads=reads)
    if batch_size is not None:
        # One value of a token in each block, of which a step makes several.
        rows = batch_size * (1 if plan.sampling.guidance_scale is None else 2)
        size_bytes = 4 * rows * plan.model.blocks * plan.model.tokens * plan.model.width
        check_fits_memory(size_bytes, f"a static batch of {batch_size}")
    if one_graph and not token_groups(plan.cache, plan.phases_used(), plan.model.tokens):
        raise UsageError(
            f"{plan_folder}: no cached step of the plan runs the model on some of the tokens, so there is nothing to"
            " make one graph of; leave --one-graph out"
        )
    warn_of_plan(plan, plan_folder)
    progress("loading the checkpoint")
    model = model_of_plan(plan, str(plan_folder), model_path, variant)
    check_cost(plan, model, str(plan_folder))
    family, geometry = model.family, model.geometry
    parts = PipelineParts(
        pipeline_path or model_path or Path(plan.model.source),
        family,
        geometry,
        decoder=with_decoder,
        text_encoder=with_text_encoder,
        variant=variant or plan.model.variant,
        progress=progress,
    )
    with new_folder(destination, BUNDLE_FOLDER) as folder:
        (folder / ONNX_FOLDER).mkdir()
        steps = _exported_steps(
            model,
            plan,
            tables,
            folder,
            str(plan_folder),
            batch_size=batch_size,
            precision=precision,
            fp32_blocks=fp32_blocks,
            check=check,
            graphs_from=graphs_from,
            samples=samples,
            one_graph=one_graph,
            conditions=conditions,
            progress=progress,
        )
        # The transformer's memory is free before an autoencoder or a text encoder takes some.
        del model
        made = parts.export(folder, batch_size=batch_size, trajectory=steps.trajectory, check=check, progress=progress)
        records = steps.records | {name: part.graph for name, part in made.graphs.items()}
        sample_files: list[str] = []
        if steps.trajectory is not None:
            more = {name: part.samples for name, part in made.graphs.items() if part.samples is not None}
            sample_files = write_samples(steps.samples | more, steps.trajectory, folder)
        write_plan_files(plan, tables, folder, destination)
        (folder / RUNTIME_TABLES).write_bytes(safetensors.numpy.save(_runtime_tables(steps.solver)))
        names = [
            PLAN,
            TABLES,
            RUNTIME_TABLES,
            *dict.fromkeys(record.file for record in records.values()),
            f"{ONNX_FOLDER}/{WEIGHTS}",
            *(item.file for item in (made.text.tokenizers if made.text else ())),
            *sample_files,
        ]
        manifest = Manifest(
            kind="bundle",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            plan_sha256=content_sha256(plan),
            precision=precision,
            fp32_blocks=tuple(sorted(fp32_blocks)),
            batch_size=batch_size,
            latent_shape=geometry.latent_shape,
            pixels=geometry.pixels,
            conditions=tuple(
                ConditionRecord(name=item.name, dtype=item.dtype, shape=item.shape, classes=item.classes)
                for item in geometry.conditions
            ),
            sampled_on=_said_in(destination, steps.sampled_on),
            solver=SolverRecord(
                history=steps.solver.history,
                init_noise_sigma=steps.solver.init_noise_sigma,
                guidance_scale=plan.sampling.guidance_scale,
                true_cfg=family.convention.true_cfg,
                embedded_guidance=_embedded_guidance(plan, family, geometry),
            ),
            graphs=records,
            decoder=made.decoder,
            text=made.text,
            files=file_records(folder, names),
        )
        write_manifest(manifest, folder)
    return manifest


def _said_in(
    bundle: Path, record: PromptsRecord | Literal["random", "labels"]
) -> PromptsRecord | Literal["random", "labels"]:
    """What was sampled on, its path as documents in the bundle say it."""
    if not isinstance(record, PromptsRecord):
        return record
    return record.model_copy(update={"file": relative_path(record.file, bundle)})


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What was exported of the model and its solver."""

    records: dict[str, GraphRecord]
    solver: SolverTable
    samples: dict[str, GraphSamples]
    """By graph; empty where none are wanted."""
    trajectory: Trajectory | None
    sampled_on: PromptsRecord | Literal["random", "labels"]


def _exported_steps(
    model: DiffusionTransformer,
    plan: Plan,
    tables: Mapping[str, FloatArray | IntArray],
    folder: Path,
    where: str,
    *,
    batch_size: int | None,
    precision: Precision,
    fp32_blocks: Collection[str],
    check: bool,
    graphs_from: Path | None,
    samples: bool,
    one_graph: bool,
    conditions: str | None,
    progress: Callable[[str], None],
) -> _Steps:
    """Write the graphs of the model and of its solver; see :func:`export_bundle`. Keeps nothing of the model."""
    guided = plan.sampling.guidance_scale is not None
    prompts = prompts_of_plan(model, plan, conditions, progress=progress)
    sampling = dataclasses.replace(sampling_from_plan(plan), prompts=prompts)
    conditioned = sampled_on(model, prompts)
    progress("reading the solver's coefficients off the scheduler")
    solver = read_solver(sampling.scheduler, plan.schedule.steps, plan.sampling.set_timesteps_kwargs)
    found = tuple(solver.timesteps.tolist())
    if found != plan.sampling.timesteps:
        raise PlanError(
            f"{where}: {other_timesteps(plan.sampling.timesteps, found)}, which {plan.sampling.scheduler_class} gives"
            " with the installed diffusers; install the version that it was made with, or calibrate again"
        )
    batch = batch_size or EXAMPLE_BATCH
    step_tables = plan.step_tables(tables)
    graphs: dict[int, ModelGraph] = {}
    onnx = folder / ONNX_FOLDER
    if graphs_from is None:
        progress("sampling with the plan in PyTorch, for inputs as they occur")
        with (
            half_products(model, precision, fp32_blocks, stored=False),
            overflow_refused(model, precision, fp32_blocks),
        ):
            graphs = step_graphs(model, plan.cache, plan.phases_used(), one_graph=one_graph)
            examples = example_inputs(model, plan, step_tables, sampling, batch, graphs[FULL].groups)
        dynamic = batch_size is None
        records = _exported(
            model, graphs, examples, onnx, precision, fp32_blocks, dynamic=dynamic, check=check, progress=progress
        )
    else:
        with reading(graphs_from, BUNDLE_FOLDER):
            records = _taken_graphs(graphs_from, plan, batch_size, precision, fp32_blocks, onnx, one_graph=one_graph)
    geometry = model.geometry
    onnx_model = solver_model(solver.history, geometry.latent_shape, geometry.output_channels, guided, batch_size)
    records[SOLVER] = saved_graph(onnx_model, onnx / f"{SOLVER}.onnx")
    if check:
        progress(f"comparing {SOLVER} with the scheduler")
        half = (batch, geometry.output_channels, *geometry.latent_shape[1:])
        error = check_solver_graph(solver, sampling, half, onnx / f"{SOLVER}.onnx")
        records[SOLVER] = records[SOLVER].model_copy(update={"max_abs_error": error})
    # Polygraphy's files have no bfloat16.
    if not (samples and check and graphs and precision is not Precision.BF16):
        return _Steps(records=records, solver=solver, samples={}, trajectory=None, sampled_on=conditioned)
    progress("sampling with the plan and in full, to validate engines by")
    made, trajectory = samples_of(
        graphs, records, plan, step_tables, sampling, solver, batch_size or 1, precision, fp32_blocks
    )
    return _Steps(records=records, solver=solver, samples=made, trajectory=trajectory, sampled_on=conditioned)


def _embedded_guidance(plan: Plan, family: Family, geometry: Geometry) -> float | None:
    """What a model whose guidance is distilled is told by default: the plan's strength, or the pipeline's."""
    chosen = plan.sampling.embedded_guidance
    if not geometry.embeds_guidance:
        return None
    return family.convention.embedded_guidance if chosen is None else chosen


def _exported(
    model: DiffusionTransformer,
    graphs: Mapping[int, ModelGraph],
    examples: Mapping[int, Mapping[str, Tensor]],
    onnx: Path,
    precision: Precision,
    fp32_blocks: Collection[str],
    *,
    dynamic: bool,
    check: bool,
    progress: Callable[[str], None],
) -> dict[str, GraphRecord]:
    """Write the full and cached graphs and their weights, and compare them; returns how the manifest names them."""
    records: dict[str, GraphRecord] = {}
    samples: dict[int, Tensor] = {}
    variants_of: dict[ModelGraph, list[int]] = {}
    for variant, graph in graphs.items():
        variants_of.setdefault(graph, []).append(variant)
    with half_products(model, precision, fp32_blocks):
        with WeightsFile(onnx / WEIGHTS, dict(model.module.named_parameters())) as weights:
            for graph, variants in variants_of.items():
                progress(f"exporting {graph.stem}")
                # Where several variants share it, the first is the full one: many tokens, as the exporter wants them.
                onnx_model = onnx_from_graph(graph, examples[variants[0]], dynamic_batch=dynamic, precision=precision)
                weights.pack(onnx_model)
                record = saved_graph(onnx_model, onnx / f"{graph.stem}.onnx")
                for variant in variants:
                    sizes = {group.axis: group.size(variant) for group in graph.groups}
                    records[variant_name(variant)] = _sized(record, sizes)
        for variant, graph in graphs.items() if check else ():
            name = variant_name(variant)
            progress(f"comparing {name} with PyTorch")
            error, samples[variant] = check_graph(graph, examples[variant], onnx / f"{graph.stem}.onnx", precision)
            records[name] = records[name].model_copy(update={"max_abs_error": error})
    if precision is not Precision.FP32:
        for variant, sample in samples.items():
            name = variant_name(variant)
            snr_db = snr_to_fp32_db(graphs[variant], examples[variant], sample)
            records[name] = records[name].model_copy(update={"snr_to_fp32_db": snr_db})
    return records


def _sized(record: GraphRecord, sizes: Mapping[str, int]) -> GraphRecord:
    """A graph at a variant's numbers of tokens.

    Raises:
        ExportError: the exporter has left another axis open, or named one otherwise.
    """
    sized = record.sized(sizes)
    for tensor in (*sized.inputs, *sized.outputs):
        unknown = {size for size in tensor.shape if isinstance(size, str)} - {MODEL_BATCH}
        if unknown:
            raise ExportError(f"{record.file}: {tensor.name} has an axis of unknown size, {unknown.pop()}")
    return sized


def _taken_graphs(
    bundle: Path,
    plan: Plan,
    batch_size: int | None,
    precision: Precision,
    fp32_blocks: Collection[str],
    onnx: Path,
    *,
    one_graph: bool,
) -> dict[str, GraphRecord]:
    """Copy the full and cached graphs and the weights of a bundle; returns how the manifest names them.

    The weights of its decoder and text encoders come along, unread.
    """
    documents = read_documents(bundle)
    manifest, other = documents.manifest, documents.plan
    guided = plan.sampling.guidance_scale is not None
    kind = (manifest.precision, set(manifest.fp32_blocks), manifest.one_graph)
    fits = (other.model, other.cache, other.phases_used(), manifest.batch_size, manifest.guided, kind)
    wanted = (precision, set(fp32_blocks), one_graph)
    if fits != (plan.model, plan.cache, plan.phases_used(), batch_size, guided, wanted):
        raise UsageError(
            f"{bundle}: its graphs are of another model, other cache settings, another batch or precision, or one graph"
            " where there should be several; export anew"
        )
    records = {name: record for name, record in manifest.graphs.items() if name not in (SOLVER, *FP32_GRAPHS)}
    for name in (f"{ONNX_FOLDER}/{WEIGHTS}", *{record.file for record in records.values()}):
        shutil.copyfile(bundle / name, onnx / Path(name).name)
    return records


def _runtime_tables(solver: SolverTable) -> dict[str, FloatArray]:
    return {
        "coefficients": solver.coefficients,
        "init_noise_sigma": np.array([solver.init_noise_sigma], np.float32),
        "input_scale": solver.input_scale,
        "timesteps": solver.timesteps,
    }
