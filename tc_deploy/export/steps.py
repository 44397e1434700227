"""The model's graphs and its solver's: exported, or taken from another bundle, and compared with PyTorch.

In: a model, its plan, options. Out: ONNX files and their weights in a folder that is being made, and what a manifest
says of them. Never: writes a manifest.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from tc_deploy.bundle import reading
from tc_deploy.consistency import read_documents
from tc_deploy.errors import ExportError, PlanError, UsageError
from tc_deploy.export.check import check_graph, check_solver_graph, example_inputs, snr_to_fp32_db
from tc_deploy.export.golden import samples_of
from tc_deploy.export.graphs import EXAMPLE_BATCH, onnx_from_graph
from tc_deploy.export.options import ExportOptions
from tc_deploy.export.saving import saved_graph
from tc_deploy.export.solver_graph import solver_model
from tc_deploy.export.weights import WeightsFile
from tc_deploy.figures import other_timesteps
from tc_deploy.golden import GoldenGraph, Trajectory
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    FP32_GRAPHS,
    MODEL_BATCH,
    ONNX_FOLDER,
    SOLVER,
    WEIGHTS,
    GraphRecord,
    solver_inputs,
    solver_outputs,
    variant_name,
)
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable, read_solver
from tc_deploy.plan import Plan, PromptsRecord, TextsRecord
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.planned.prompts import prompts_of_plan, sampled_on
from tc_deploy.schedule import FULL
from tc_deploy.tokencache.graphs import ModelGraph, step_graphs
from tc_deploy.tokencache.precision import half_products, overflow_refused
from tc_deploy.types import FloatArray, IntArray, Precision


@dataclass(frozen=True, kw_only=True)
class ExportedSteps:
    """What was exported of the model and its solver."""

    records: dict[str, GraphRecord]
    solver: SolverTable
    samples: dict[str, GoldenGraph]
    """By graph; empty where none are wanted."""
    trajectory: Trajectory | None
    sampled_on: PromptsRecord | TextsRecord | Literal["random", "labels"]


def exported_steps(
    model: DiffusionTransformer,
    plan: Plan,
    tables: Mapping[str, FloatArray | IntArray],
    folder: Path,
    where: str,
    options: ExportOptions,
    progress: Callable[[str], None],
) -> ExportedSteps:
    """Write the graphs of the model and of its solver, and the weights; keeps nothing of the model.

    Args:
        model: the plan's.
        plan: the plan.
        tables: the plan's.
        folder: the bundle that is being made.
        where: the plan's folder, for messages.
        options: how.
        progress: told what is being done.

    Raises:
        PlanError: the installed diffusers' scheduler gives other timesteps than the plan has.
        ExportError: a graph or the scheduler cannot be exported, a graph departs from PyTorch, or a product overflows.
        UsageError: the conditions do not fit the model, or the bundle to take graphs from holds others.
    """
    guided = plan.sampling.guidance_scale is not None
    prompts = prompts_of_plan(model, plan, options.conditions, pipeline_path=options.pipeline_path, progress=progress)
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
    batch = options.batch_size or EXAMPLE_BATCH
    step_tables = plan.step_tables(tables)
    graphs: dict[int, ModelGraph] = {}
    onnx = folder / ONNX_FOLDER
    if options.graphs_from is None:
        progress("sampling with the plan in PyTorch, for inputs as they occur")
        with (
            half_products(model, options.precision, options.fp32_blocks, stored=False),
            overflow_refused(model, options.precision, options.fp32_blocks),
        ):
            graphs = step_graphs(model, plan.cache, plan.phases_used(), one_graph=options.one_graph)
            examples = example_inputs(model, plan, step_tables, sampling, batch, graphs[FULL].groups)
        records = _exported(model, graphs, examples, onnx, options, progress)
    else:
        with reading(options.graphs_from, BUNDLE_FOLDER):
            records = _taken_graphs(options.graphs_from, plan, onnx, options)
    geometry = model.geometry
    onnx_model = solver_model(
        solver.history,
        geometry.latent_shape,
        geometry.output_channels,
        guided,
        options.batch_size,
        sampling.guidance_rule,
    )
    solver_tensors = (*solver_inputs(solver.history, guided=guided), *solver_outputs(solver.history))
    records[SOLVER] = saved_graph(onnx_model, onnx / f"{SOLVER}.onnx", solver_tensors)
    if options.check:
        progress(f"comparing {SOLVER} with the scheduler")
        half = (batch, geometry.output_channels, *geometry.latent_shape[1:])
        error = check_solver_graph(solver, sampling, half, onnx / f"{SOLVER}.onnx")
        records[SOLVER] = records[SOLVER].model_copy(update={"max_abs_error": error})
    if not options.wants_samples:
        return ExportedSteps(records=records, solver=solver, samples={}, trajectory=None, sampled_on=conditioned)
    progress("sampling with the plan and in full, to validate engines by")
    made, trajectory = samples_of(
        graphs,
        records,
        plan,
        step_tables,
        sampling,
        solver,
        options.batch_size or 1,
        options.precision,
        options.fp32_blocks,
    )
    return ExportedSteps(records=records, solver=solver, samples=made, trajectory=trajectory, sampled_on=conditioned)


def _exported(
    model: DiffusionTransformer,
    graphs: Mapping[int, ModelGraph],
    examples: Mapping[int, Mapping[str, Tensor]],
    onnx: Path,
    options: ExportOptions,
    progress: Callable[[str], None],
) -> dict[str, GraphRecord]:
    """Write the full and cached graphs and their weights, and compare them; returns how the manifest names them."""
    dynamic = options.batch_size is None
    records: dict[str, GraphRecord] = {}
    samples: dict[int, Tensor] = {}
    variants_of: dict[ModelGraph, list[int]] = {}
    for variant, graph in graphs.items():
        variants_of.setdefault(graph, []).append(variant)
    with half_products(model, options.precision, options.fp32_blocks):
        with WeightsFile(onnx / WEIGHTS, dict(model.module.named_parameters())) as weights:
            for graph, variants in variants_of.items():
                progress(f"exporting {graph.stem}")
                # Where several variants share it, the first is the full one: many tokens, as the exporter wants them.
                onnx_model = onnx_from_graph(
                    graph, examples[variants[0]], dynamic_batch=dynamic, precision=options.precision
                )
                weights.pack(onnx_model)
                record = saved_graph(onnx_model, onnx / f"{graph.stem}.onnx", (*graph.inputs, *graph.outputs))
                for variant in variants:
                    sizes = {group.axis: group.size(variant) for group in graph.groups}
                    records[variant_name(variant)] = _sized(record, sizes)
        for variant, graph in graphs.items() if options.check else ():
            name = variant_name(variant)
            progress(f"comparing {name} with PyTorch")
            error, samples[variant] = check_graph(
                graph, examples[variant], onnx / f"{graph.stem}.onnx", options.precision
            )
            records[name] = records[name].model_copy(update={"max_abs_error": error})
    if options.precision is not Precision.FP32:
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


def _taken_graphs(bundle: Path, plan: Plan, onnx: Path, options: ExportOptions) -> dict[str, GraphRecord]:
    """Copy the full and cached graphs and the weights of a bundle; returns how the manifest names them.

    The weights of its decoder and text encoders come along, unread.
    """
    documents = read_documents(bundle)
    manifest, other = documents.manifest, documents.plan
    guided = plan.sampling.guidance_scale is not None
    kind = (manifest.precision, set(manifest.fp32_blocks), manifest.one_graph)
    fits = (other.model, other.cache, other.phases_used(), manifest.batch_size, manifest.guided, kind)
    wanted = (options.precision, set(options.fp32_blocks), options.one_graph)
    if fits != (plan.model, plan.cache, plan.phases_used(), options.batch_size, guided, wanted):
        raise UsageError(
            f"{bundle}: its graphs are of another model, other cache settings, another batch or precision, or one graph"
            " where there should be several; export anew"
        )
    records = {name: record for name, record in manifest.graphs.items() if name not in (SOLVER, *FP32_GRAPHS)}
    for name in (f"{ONNX_FOLDER}/{WEIGHTS}", *{record.file for record in records.values()}):
        shutil.copyfile(bundle / name, onnx / Path(name).name)
    return records
