"""Real inputs for every graph, and the comparison of an exported graph with PyTorch.

Inputs come from a sampling run under the plan: latents, caches and indices as they occur, not noise alone. Graphs run
in ONNX Runtime; those in bf16, which it does not have on a CPU, in OpenVINO.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.errors import ExportError, first_line
from tc_deploy.groups import TokenGroup, group_inputs, running_variants
from tc_deploy.libraries import imported
from tc_deploy.manifest import (
    MODEL_OUTPUT,
    NEXT_LATENTS,
    Role,
    cache_tensor,
    guided_output_tensor,
    latents_tensor,
)
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable
from tc_deploy.plan import Plan
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.precisions import PRECISIONS
from tc_deploy.schedule import FULL, PHASES
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.forward import run_full
from tc_deploy.tokencache.graphs import NamedGraph
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.tolerances import tolerance
from tc_deploy.types import Precision


class _Enough(Exception):  # noqa: N818 - ends the sampling run, no error
    pass


def example_inputs(
    model: DiffusionTransformer,
    plan: Plan,
    step_tables: StepTables,
    sampling: Sampling,
    batch: int,
    groups: Sequence[TokenGroup] = (),
) -> dict[int, dict[str, Tensor]]:
    """Inputs of every variant, by tensor name, from one sampling run with ``batch`` samples.

    A variant's inputs are those of its last step before every variant was seen and every history was full. ``groups``
    are those of the graph that all variants share, where they do.
    """
    noise, conditions = draw_batch(model, sampling, range(batch))
    schedule = plan.run_schedule()
    steps = TokenCachedSteps(model, plan.cache, schedule, step_tables)
    wanted = {FULL, *plan.phases_used()}
    examples: dict[int, dict[str, Tensor]] = {}

    def step_function(step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        variant = schedule.variants[step]
        examples[variant] = step_inputs(steps, step, inputs, groups)
        filled = len(steps.history) > plan.cache.forecast_order
        if wanted == set(examples) and filled:
            raise _Enough
        return steps(step, inputs)

    with contextlib.suppress(_Enough):
        denoise(model, sampling.under(step_tables), noise, conditions, step_function)
    return examples


def step_inputs(
    steps: TokenCachedSteps, step: int, inputs: Mapping[str, Tensor], groups: Sequence[TokenGroup] = ()
) -> dict[str, Tensor]:
    """Everything that a step's graph reads, by tensor name, given the model's own inputs; the step is not run.

    A graph that all variants share (its ``groups`` are given) reads caches in a full step too, to no effect: zeros.
    """
    variant, batch = steps.schedule.variants[step], len(inputs["timestep"])
    if variant not in running_variants(steps.cache, PHASES):
        groups = ()  # A step that skips the model has a graph of its own.
    example = dict(inputs)
    rows = None
    if variant != FULL:
        history, weights, rows = steps.cached_arguments(step, batch)
        example[Role.FORECAST_WEIGHTS] = weights.contiguous()
    elif groups:
        noted = steps.history[0] if steps.history else run_full(steps.model, steps.cache, inputs)[1]
        history = [{name: torch.zeros_like(tensor) for name, tensor in noted.items()}] * (
            steps.cache.forecast_order + 1
        )
        example[Role.FORECAST_WEIGHTS] = steps.weights[step].expand(batch, -1).contiguous()
    else:
        return example
    for age, noted in enumerate(history):
        # A history that is not full yet holds a step twice, which the exporter would make one input.
        repeated = any(noted is later for later in history[:age])
        example |= {
            cache_tensor(name, age).name: tensor.clone() if repeated else tensor for name, tensor in noted.items()
        }
    if rows is not None:
        example[Role.TOKEN_INDEX] = rows.contiguous()
    row = None if rows is None else rows.reshape(-1, rows.shape[-1])[0].cpu().numpy()
    for name, values in group_inputs(groups, steps.cache, steps.model.geometry.tokens, variant, row).items():
        given = torch.from_numpy(values.copy()).to(steps.weights.device)
        shared = values.ndim > 0 and steps.model.family.shares_index
        example[name] = given if shared else given.expand(batch, *given.shape).contiguous()
    return example


def check_graph(
    graph: NamedGraph,
    example: Mapping[str, Tensor],
    path: Path,
    precision: Precision = Precision.FP32,
    reads: Sequence[str] | None = None,
) -> tuple[float, Tensor]:
    """Run an exported graph in an engine and in PyTorch, whose products are in ``precision`` now, on the same inputs.

    Args:
        graph: what it was exported from.
        example: the inputs of both, by name.
        path: the exported graph.
        precision: what its products are in.
        reads: its inputs, where they are not those of ``graph``.

    Returns:
        The largest absolute difference over all outputs, and the engine's ``sample``.

    Raises:
        ExportError: an output departs by more than the tolerance, or is not finite; names the output.
        BackendError: the engine is not installed.
    """
    feed = {name: example[name] for name in reads or graph.input_names}
    found = dict(zip(graph.output_names, run_in_engine(path, feed, graph.output_names, precision), strict=True))
    with torch.no_grad():
        made = graph(*(example[name] for name in graph.input_names))
    expected = dict(zip(graph.output_names, made, strict=True))
    return _worst_error(path, found, expected, precision), found[Role.SAMPLE]


def run_in_engine(path: Path, feed: Mapping[str, Tensor], outputs: Sequence[str], precision: Precision) -> list[Tensor]:
    """Run an exported graph in the engine that checks this precision; returns what it makes of the outputs named.

    Raises:
        ExportError: the engine refuses the graph.
        BackendError: the engine is not installed.
    """
    return _RUNS[PRECISIONS[precision].checked_by](path, feed, outputs)


def check_outputs(path: Path, feed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Run an exported fp32 graph in ONNX Runtime, and compare its outputs with what PyTorch made before.

    Returns:
        The largest absolute difference over all outputs.

    Raises:
        ExportError: as for :func:`check_graph`.
        BackendError: ONNX Runtime is not installed.
    """
    found = dict(zip(expected, _run_in_onnxruntime(path, feed, list(expected)), strict=True))
    return _worst_error(path, found, expected, Precision.FP32)


def snr_to_fp32_db(graph: NamedGraph, example: Mapping[str, Tensor], sample: Tensor) -> float | None:
    """What half precision costs one pass.

    Args:
        graph: the variant, whose module is in fp32 again.
        example: what the half graph was given.
        sample: what it made of it.

    Returns:
        The power of the model's fp32 output over that of the error, in dB; None where there is no error, as in a graph
        without matrix products.
    """
    with torch.no_grad():
        feed = (example[name] for name in graph.input_names)
        expected = graph(*(given.float() if given.is_floating_point() else given for given in feed))
    error, signal = (float(values.double().square().mean()) for values in (sample - expected[0].cpu(), expected[0]))
    return 10 * math.log10(signal / error) if error and signal else None


def check_solver_graph(table: SolverTable, sampling: Sampling, guided_shape: tuple[int, ...], path: Path) -> float:
    """Run the solver's graph over a whole trajectory in ONNX Runtime, and the diffusers scheduler beside it.

    Args:
        table: the coefficients.
        sampling: the scheduler they were read off.
        guided_shape: (B, output channels, H, W) of one half of the model's output; the other half is drawn likewise.
        path: the graph.

    Returns:
        The largest absolute difference of the latents after any step.

    Raises:
        ExportError: the latents depart by more than the tolerance.
        BackendError: ONNX Runtime is not installed.
    """
    session = _session(path)
    inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    outputs = [tensor.name for tensor in session.get_outputs()]
    batch, channels = guided_shape[0], int(inputs[Role.LATENTS][1])
    generator = torch.Generator().manual_seed(0)
    scheduler = sampling.fresh_scheduler()
    latents = torch.randn((batch, channels, *guided_shape[2:]), generator=generator) * table.init_noise_sigma
    earlier = [latents.numpy()] * (table.history + 1)
    guided = [np.zeros_like(earlier[0])] * table.history
    worst = 0.0
    for step, timestep in enumerate(scheduler.timesteps):
        halves = torch.randn((2, *guided_shape), generator=generator)
        scale = sampling.guidance_scale
        output = sampling.guided(halves[0] if scale is None else halves.flatten(0, 1))
        latents = scheduler.step(output[:, :channels], timestep, latents, return_dict=False)[0]
        feed: dict[str, NDArray[Any]] = {
            MODEL_OUTPUT.name: (halves[0] if scale is None else halves.flatten(0, 1)).numpy(),
            Role.COEFFICIENTS: np.tile(table.coefficients[step], (batch, 1)),
            Role.INPUT_SCALE: np.ones(batch, np.float32),
            Role.GUIDANCE_SCALE: np.full(batch, scale or 0.0, np.float32),
        }
        feed |= {latents_tensor(age).name: array for age, array in enumerate(earlier)}
        feed |= {guided_output_tensor(age).name: array for age, array in enumerate(guided, start=1)}
        found = dict(zip(outputs, session.run(outputs, {name: feed[name] for name in inputs}), strict=True))
        where = f"{path.name}: latents after step {step}"
        worst = max(worst, _checked_error(found[NEXT_LATENTS.name], latents.numpy(), where))
        earlier = [found[NEXT_LATENTS.name], *earlier[:-1]]
        if table.history:
            guided = [found[Role.GUIDED_OUTPUT], *guided[:-1]]
    return worst


def _run_in_onnxruntime(path: Path, feed: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
    found = _session(path).run(list(outputs), {name: given.cpu().numpy() for name, given in feed.items()})
    return [torch.from_numpy(array) for array in found]


def _run_in_openvino(path: Path, feed: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
    openvino = imported("openvino", purpose="the check of a bf16 export needs OpenVINO (--no-check leaves it out): ")
    try:
        core = openvino.Core()
        # The hint leaves bf16 operators alone; OpenVINO's own default would make the others bf16 too.
        request = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
        for name, given in feed.items():
            kind = request.get_tensor(name).element_type
            tensor = openvino.Tensor(kind, openvino.Shape(given.shape))
            tensor.data[...] = _bits(given.cpu()).numpy()
            request.set_tensor(name, tensor)
        request.infer()
    except RuntimeError as error:
        raise ExportError(f"{path.name}: OpenVINO refuses the graph: {first_line(error)}") from error
    return [_from_openvino(request.get_tensor(name)) for name in outputs]


_RUNS = {"onnxruntime": _run_in_onnxruntime, "openvino": _run_in_openvino}
"""By engine."""


def _bits(tensor: Tensor) -> Tensor:
    """What numpy sees of a tensor: it has no bf16, and OpenVINO shows it such a tensor's memory as fp16."""
    return tensor.view(torch.float16) if tensor.dtype is torch.bfloat16 else tensor


def _from_openvino(tensor: Any) -> Tensor:
    found = torch.from_numpy(tensor.data.copy())
    return found.view(torch.bfloat16) if tensor.element_type.get_type_name() == "bf16" else found


def _session(path: Path) -> Any:
    onnxruntime = imported("onnxruntime", purpose="the check after export needs it (--no-check leaves it out): ")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Prepacked weights are a second copy of them, and a check runs once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own per status, without a common base
        raise ExportError(f"{path.name}: ONNX Runtime refuses the graph: {str(error).strip()}") from error


def _worst_error(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: Precision
) -> float:
    worst = 0.0
    for name, theirs in expected.items():
        where = f"{path.name}: output {name}"
        worst = max(worst, _checked_error(found[name].float().numpy(), theirs.float().cpu().numpy(), where, precision))
    return worst


def _checked_error(
    found: NDArray[Any], expected: NDArray[Any], what: str, precision: Precision = Precision.FP32
) -> float:
    error = float(np.abs(found - expected).max())
    allowed = tolerance("export", precision, "output_max_rel") * max(float(expected.std()), 1e-3)
    if not math.isfinite(error) or error > allowed:
        raise ExportError(
            f"{what} departs from PyTorch by {error:.2e}, allowed {allowed:.2e}; the bundle was not written"
        )
    return error
