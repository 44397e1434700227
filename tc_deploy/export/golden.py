"""The samples that a bundle carries to be validated by, from two sampling runs in PyTorch: under the plan, and full.

In: a model, a plan, its sampler. Out: inputs and outputs of every graph at early, middle and late steps, and both
trajectories. Never: writes a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tc_deploy.conditions import UNCONDITIONAL, is_unconditional
from tc_deploy.export.check import step_inputs
from tc_deploy.export.rows import PrologueRows
from tc_deploy.golden import Feed, GoldenGraph, Trajectory, chosen_steps
from tc_deploy.manifest import (
    MODEL_OUTPUT,
    NEXT_LATENTS,
    PROLOGUE_GRAPHS,
    SOLVER,
    GraphRecord,
    Role,
    guided_output_tensor,
    latents_tensor,
    names_of,
    variant_name,
)
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable
from tc_deploy.plan import Plan
from tc_deploy.planned.prompts import conditions_of, tensors_of
from tc_deploy.schedule import FULL
from tc_deploy.tables import StepTables, token_index_name
from tc_deploy.tokencache.graphs import ModelGraph
from tc_deploy.tokencache.precision import half_products, overflow_refused
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.tokencache.trajectory import full_latents, latents_of
from tc_deploy.types import FloatArray, Precision

LIMIT_BYTES = 128 * 2**20
"""Of one graph's samples; caches of large models would fill gigabytes."""


class _Run:
    """A sampling run under the plan that keeps what every step of the sampler read, and wanted steps of the model."""

    def __init__(
        self,
        steps: TokenCachedSteps,
        wanted: Mapping[int, ModelGraph],
        records: Mapping[str, GraphRecord],
        prologue: PrologueRows,
    ) -> None:
        self.steps, self.wanted, self.records, self.prologue = steps, wanted, records, prologue
        self.rows: dict[int, tuple[Feed, Feed]] = {}
        """Of the wanted steps, what the prologue reads and makes."""
        self.inputs: dict[int, Feed] = {}
        self.outputs: dict[int, Feed] = {}
        self.model_outputs: list[FloatArray] = []
        self.latents: list[FloatArray] = []
        self.hidden_states: list[FloatArray] = []

    def step(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        graph = self.wanted.get(step)
        example = {} if graph is None else step_inputs(self.steps, step, inputs, graph.groups)
        output = self.steps(step, inputs)
        if graph is not None:
            left = self.steps.history[0] if self.steps.schedule.variants[step] == FULL else {}
            made = {tensor.name: left[tensor.cache] for tensor in graph.outputs if tensor.cache in left}
            made[Role.SAMPLE] = output
            if len(made) < len(graph.output_names):
                # The rows that a cached step computes, which nobody reads, only a graph for all variants gives out.
                feed = (example[name] for name in graph.input_names)
                made = dict(zip(graph.output_names, graph(*feed), strict=True)) | made
            (rows,) = self.prologue.of([example])
            self.rows[step] = (
                {name: _array(example[name]) for name in self.steps.model.input_names if name in example},
                {name: _array(array) for name, array in rows.items()},
            )
            record = self.records[variant_name(self.steps.schedule.variants[step])]
            self.inputs[step] = {name: _array({**example, **rows}[name]) for name in names_of(record.inputs)}
            self.outputs[step] = {name: _array(made[name]) for name in graph.output_names}
        self.model_outputs.append(_array(output))
        return output

    def note(self, step: int, inputs: Mapping[str, Tensor], latents: Tensor) -> None:  # noqa: ARG002 - denoise's
        self.hidden_states.append(_array(inputs[Role.HIDDEN_STATES]))
        self.latents.append(_array(latents))


def samples_of(
    graphs: Mapping[int, ModelGraph],
    records: Mapping[str, GraphRecord],
    prologue: PrologueRows,
    plan: Plan,
    step_tables: StepTables,
    sampling: Sampling,
    solver: SolverTable,
    batch: int,
    precision: Precision = Precision.FP32,
    fp32_blocks: Collection[str] = (),
) -> tuple[dict[str, GoldenGraph], Trajectory]:
    """Sample under the plan and in full.

    Args:
        graphs: of each variant, as it was exported.
        records: how the manifest names the graphs.
        prologue: makes what the steps' graphs read in the place of computing it.
        plan: the plan.
        step_tables: its tables.
        sampling: its sampler.
        solver: the plan's, as a table.
        batch: samples in a batch.
        precision: what the graphs' products are in.
        fp32_blocks: names of blocks that stay in fp32.

    Returns:
        By graph name its samples, and the trajectory.

    Raises:
        ExportError: a half product overflows.
    """
    model = next(iter(graphs.values())).model
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((batch, *model.geometry.latent_shape), generator=generator)
    conditions = model.random_conditions(batch, generator)
    if sampling.prompts is not None:
        conditions = tensors_of(conditions_of(model, sampling.prompts, range(batch)))
    schedule = plan.run_schedule()
    chosen: dict[int, tuple[int, ...]] = {}
    for variant in graphs:
        steps = [step for step, ran in enumerate(schedule.variants) if ran == variant]
        rows = batch * (1 if sampling.guidance_scale is None else 2)
        chosen[variant] = chosen_steps(steps, rows * _bytes_per_row(records[variant_name(variant)]), LIMIT_BYTES)
    wanted = {step: graphs[variant] for variant, steps_of in chosen.items() for step in steps_of}
    run = _Run(TokenCachedSteps(model, plan.cache, schedule, step_tables), wanted, records, prologue)
    solved = sampling.under(step_tables)
    with half_products(model, precision, fp32_blocks, stored=False), overflow_refused(model, precision, fp32_blocks):
        denoise(model, solved, noise, conditions, run.step, run.note)
    cached = exact = np.stack(run.latents)
    if precision is not Precision.FP32:
        steps_of_plan = TokenCachedSteps(model, plan.cache, schedule, step_tables)
        exact = latents_of(model, solved, noise, conditions, steps_of_plan)
    samples = {}
    for variant, steps_of in chosen.items():
        samples[variant_name(variant)] = GoldenGraph(
            steps=steps_of,
            inputs=tuple(run.inputs[step] for step in steps_of),
            outputs=tuple(run.outputs[step] for step in steps_of),
        )
    for name in PROLOGUE_GRAPHS:
        if name in records:
            samples[name] = _prologue_samples(run, records[name], chosen[FULL])
    first = _array(noise) * np.float32(solver.init_noise_sigma)
    samples[SOLVER] = _solver_samples(run, records[SOLVER], solver, sampling, first)
    tables = {
        Role.TIMESTEP: solver.timesteps,
        Role.COEFFICIENTS: solver.coefficients,
        Role.INPUT_SCALE: solver.input_scale,
        Role.FORECAST_WEIGHTS: step_tables.forecast_weights,
        **{token_index_name(phase): table for phase, table in step_tables.token_index.items()},
    }
    return samples, Trajectory(
        noise=_array(noise),
        conditions={name: _array(tensor) for name, tensor in conditions.items() if not is_unconditional(name)},
        unconditional={} if sampling.guidance_scale is None else _unconditional(model, conditions),
        full=full_latents(model, plan, sampling, noise, conditions),
        exact=exact,
        cached=cached,
        variants=schedule.variants,
        tables=tables,
    )


def _prologue_samples(run: _Run, record: GraphRecord, steps: tuple[int, ...]) -> GoldenGraph:
    """What a graph of the prologue reads and makes for some steps, as the engine that checks exports makes it."""
    inputs, outputs = (
        tuple({name: run.rows[step][made][name] for name in names_of(tensors)} for step in steps)
        for made, tensors in enumerate((record.inputs, record.outputs))
    )
    return GoldenGraph(steps=steps, inputs=inputs, outputs=outputs)


def _unconditional(model: DiffusionTransformer, conditions: Mapping[str, Tensor]) -> Feed:
    absent = {name: both[len(both) // 2 :] for name, both in model.with_unconditional(conditions).items()}
    return {name: _array(conditions.get(UNCONDITIONAL + name, other)) for name, other in absent.items()}


def _solver_samples(
    run: _Run, record: GraphRecord, solver: SolverTable, sampling: Sampling, first: FloatArray
) -> GoldenGraph:
    """What the solver's graph reads and writes at an early, a middle and a late step, as PyTorch computes it."""
    batch, channels = first.shape[:2]
    latents = [first, *run.latents]
    guided = [_guided(output, sampling.guidance_scale)[:, :channels] for output in run.model_outputs]
    # After the last step there is no next input to compare with.
    steps = chosen_steps(range(max(solver.steps - 1, 1)), 0, 1)
    inputs, outputs = [], []
    for step in steps:
        scale = solver.input_scale[step + 1] if step + 1 < solver.steps else np.float32(1)
        feed: Feed = {
            MODEL_OUTPUT.name: run.model_outputs[step],
            Role.COEFFICIENTS: np.tile(solver.coefficients[step], (batch, 1)),
            Role.INPUT_SCALE: np.full(batch, scale, np.float32),
            Role.GUIDANCE_SCALE: np.full(batch, sampling.guidance_scale or 0.0, np.float32),
        }
        for age in range(solver.history + 1):
            feed[latents_tensor(age).name] = latents[max(step - age, 0)]
            feed[guided_output_tensor(age).name] = guided[step - age] if step >= age else np.zeros_like(guided[0])
        last = step + 1 == solver.steps
        made: Feed = {
            NEXT_LATENTS.name: latents[step + 1],
            Role.HIDDEN_STATES: latents[step + 1] if last else run.hidden_states[step + 1],
            Role.GUIDED_OUTPUT: guided[step],
        }
        if last and sampling.guidance_scale is not None:
            made[Role.HIDDEN_STATES] = np.concatenate([made[Role.HIDDEN_STATES]] * 2)
        inputs.append({tensor.name: feed[tensor.name] for tensor in record.inputs})
        outputs.append({tensor.name: made[tensor.name] for tensor in record.outputs})
    return GoldenGraph(steps=steps, inputs=tuple(inputs), outputs=tuple(outputs))


def _guided(output: FloatArray, scale: float | None) -> FloatArray:
    if scale is None:
        return output
    conditional, unconditional = np.split(output, 2)
    return unconditional + np.float32(scale) * (conditional - unconditional)


def _bytes_per_row(record: GraphRecord) -> int:
    """Of all inputs and outputs, for one row of a batch."""
    tensors = (*record.inputs, *record.outputs)
    return sum(
        tensor.numpy_dtype.itemsize * int(np.prod([size for size in tensor.shape[1:] if isinstance(size, int)]))
        for tensor in tensors
    )


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().copy()
