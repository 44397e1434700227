"""The model's graphs and its solver's: exported, or taken from another bundle, and compared with PyTorch.

In: a model, its plan, options. Out: ONNX files and their weights in a folder that is being made, and what a manifest
says of them. Never: writes a manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from torch import Tensor

from tc_deploy.bundle import reading
from tc_deploy.errors import ExportError, PlanError
from tc_deploy.export.check import check_graph, check_solver_graph, example_inputs, snr_to_fp32_db
from tc_deploy.export.golden import samples_of
from tc_deploy.export.graphs import EXAMPLE_BATCH, onnx_from_graph
from tc_deploy.export.options import ExportOptions
from tc_deploy.export.prologue import Prologue
from tc_deploy.export.rows import PrologueRows
from tc_deploy.export.saving import saved_graph
from tc_deploy.export.solver_graph import solver_model
from tc_deploy.export.taken import GraphKey, TakenGraph, key_of, taken_graphs
from tc_deploy.export.weights import WeightsFile
from tc_deploy.figures import other_timesteps
from tc_deploy.golden import GoldenGraph, Trajectory
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    MODEL_BATCH,
    ONNX_FOLDER,
    PROLOGUE_GRAPHS,
    SOLVER,
    WEIGHTS,
    GraphRecord,
    names_of,
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
from tc_deploy.tokencache.sampler import planned_solver
from tc_deploy.types import FloatArray, IntArray, Precision


@dataclass(frozen=True, kw_only=True)
class ExportedSteps:
    """What was exported of the model and its solver."""

    records: dict[str, GraphRecord]
    solver: SolverTable
    """The scheduler's own."""
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
        PlanError: the installed diffusers' scheduler gives other timesteps than the plan has, or looks further back
            than its fitted solver.
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
    planned = planned_solver(solver, step_tables, plan.sampling.scheduler_class)
    # One graph for both: what the plan looks back for, a run with every step full has no use for.
    solver = solver.with_history(planned.history)
    graphs = step_graphs(model, plan.cache, plan.phases_used(), one_graph=options.one_graph)
    onnx = folder / ONNX_FOLDER
    with contextlib.ExitStack() as held:
        for bundle in options.graphs_from:
            held.enter_context(reading(bundle, BUNDLE_FOLDER))
        known = taken_graphs(options.graphs_from, model, plan, options)
        examples: dict[int, dict[str, Tensor]] = {}
        if any(key_of(graph, variant) not in known for variant, graph in graphs.items()):
            progress("sampling with the plan in PyTorch, for inputs as they occur")
            with (
                half_products(model, options.precision, options.fp32_blocks, stored=False),
                overflow_refused(model, options.precision, options.fp32_blocks),
            ):
                examples = example_inputs(model, plan, step_tables, sampling, batch, graphs[FULL].groups)
        records = _exported(model, graphs, examples, known, folder, options, plan.schedule.steps, progress)
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
        PrologueRows(folder, records, options.precision),
        plan,
        step_tables,
        sampling,
        planned,
        options.batch_size or 1,
        options.precision,
        options.fp32_blocks,
    )
    return ExportedSteps(records=records, solver=solver, samples=made, trajectory=trajectory, sampled_on=conditioned)


def _exported(
    model: DiffusionTransformer,
    graphs: Mapping[int, ModelGraph],
    examples: Mapping[int, Mapping[str, Tensor]],
    known: Mapping[GraphKey, TakenGraph],
    folder: Path,
    options: ExportOptions,
    steps: int,
    progress: Callable[[str], None],
) -> dict[str, GraphRecord]:
    """Write the full and cached graphs and their weights, and compare them; returns how the manifest names them.

    Those that are known are taken, with what was found when they were compared.
    """
    dynamic, onnx = options.batch_size is None, folder / ONNX_FOLDER
    prologue = Prologue(steps) if options.prologue else None
    records: dict[str, GraphRecord] = {}
    new: dict[int, ModelGraph] = {}
    samples: dict[int, Tensor] = {}
    variants_of: dict[ModelGraph, list[int]] = {}
    for variant, graph in graphs.items():
        variants_of.setdefault(graph, []).append(variant)
    with half_products(model, options.precision, options.fp32_blocks):
        with WeightsFile(onnx / WEIGHTS, dict(model.module.named_parameters())) as weights:
            for graph, variants in variants_of.items():
                taken = {variant: known[key] for variant in variants if (key := key_of(graph, variant)) in known}
                if len(taken) == len(variants):
                    onnx_model = ir.load(taken[variants[0]].path)
                else:
                    progress(f"exporting {graph.stem}")
                    taken = {}
                    # Where several variants share it, the first is the full one: many tokens, as the exporter wants.
                    onnx_model = onnx_from_graph(
                        graph, examples[variants[0]], dynamic_batch=dynamic, precision=options.precision
                    )
                weights.pack(onnx_model)
                reads = graph.inputs if prologue is None else prologue.cut(onnx_model, graph.inputs)
                record = saved_graph(onnx_model, onnx / f"{graph.stem}.onnx", (*reads, *graph.outputs))
                for variant in variants:
                    sized = _sized(record, {group.axis: group.size(variant) for group in graph.groups})
                    if variant in taken:
                        before = taken[variant].record
                        figures = before.model_dump(include={"max_abs_error", "snr_to_fp32_db"})
                        sized = sized.model_copy(update=figures)
                    else:
                        new[variant] = graph
                    records[variant_name(variant)] = sized
        if prologue is not None:
            records |= _prologue_records(prologue, onnx)
        checked = new if options.check else {}
        rows = PrologueRows(folder, records, options.precision).of([examples[variant] for variant in checked])
        for (variant, graph), own in zip(checked.items(), rows, strict=True):
            name = variant_name(variant)
            progress(f"comparing {name} with PyTorch")
            error, samples[variant] = check_graph(
                graph,
                {**examples[variant], **own},
                onnx / f"{graph.stem}.onnx",
                options.precision,
                names_of(records[name].inputs),
            )
            # A prologue departs where the steps do that read it.
            for checked_name in (name, *(each for each in PROLOGUE_GRAPHS if each in records)):
                worst = max(error, records[checked_name].max_abs_error or 0.0)
                records[checked_name] = records[checked_name].model_copy(update={"max_abs_error": worst})
    if options.precision is not Precision.FP32:
        for variant, sample in samples.items():
            name = variant_name(variant)
            snr_db = snr_to_fp32_db(graphs[variant], examples[variant], sample)
            records[name] = records[name].model_copy(update={"snr_to_fp32_db": snr_db})
    return records


def _prologue_records(prologue: Prologue, onnx: Path) -> dict[str, GraphRecord]:
    """Write what has left the steps' graphs; returns how the manifest names it.

    Raises:
        ExportError: nothing has.
    """
    models = prologue.models()
    if not models:
        raise ExportError(
            "--prologue: no product of the steps' graphs follows from timestep and conditions alone, so there is"
            " nothing to compute before the first step; export without it"
        )
    return {name: saved_graph(model, onnx / f"{name}.onnx", prologue.tensors(name)) for name, model in models.items()}


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
