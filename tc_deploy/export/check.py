"""Real inputs for every graph, and the comparison of an exported graph with PyTorch.

Inputs come from a sampling run under the plan: latents, caches and indices as they occur, not noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tc_deploy.errors import BackendError, ExportError
from tc_deploy.export.graphs import StepGraph
from tc_deploy.manifest import FORECAST_WEIGHTS, TOKEN_INDEX, history_name
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import Plan
from tc_deploy.schedule import FULL
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import IntArray

RELATIVE_TOLERANCE = 1e-4
"""Largest error allowed, in units of the output's standard deviation. fp32 graphs reach 1e-6 to 2e-5 (rounding in
another order of summation); a wrong sign, gate, index or cache shows as 1e-2 and more."""


class _Enough(Exception):  # noqa: N818 - ends the sampling run, no error
    pass


def example_inputs(
    model: DiffusionTransformer,
    plan: Plan,
    token_index: Mapping[int, IntArray],
    sampling: Sampling,
    batch: int,
) -> dict[int, dict[str, Tensor]]:
    """Inputs of every variant, by tensor name, from one sampling run with ``batch`` samples.

    A cached variant's inputs are those of its last cached step before enough full steps have filled every history.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((batch, *model.geometry.latent_shape), generator=generator)
    schedule = plan.tprr()
    steps = TokenCachedSteps(model, plan.cache, schedule, token_index)
    wanted = {FULL, *plan.phases_used()}
    examples: dict[int, dict[str, Tensor]] = {}

    def step_function(step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        variant = schedule.variants[step]
        example = dict(inputs)
        if variant != FULL:
            history, weights, rows = steps.cached_arguments(step, len(inputs["timestep"]))
            for age, noted in enumerate(history):
                example |= {history_name(name, age): tensor for name, tensor in noted.items()}
            example[FORECAST_WEIGHTS] = weights.contiguous()
            if rows is not None:
                example[TOKEN_INDEX] = rows.contiguous()
        examples[variant] = example
        filled = len(steps.history) > plan.cache.forecast_order
        if wanted == set(examples) and filled:
            raise _Enough
        return steps(step, inputs)

    try:
        denoise(model, sampling, noise, model.random_conditions(batch, generator), step_function)
    except _Enough:
        pass
    return examples


def check_graph(graph: StepGraph, example: Mapping[str, Tensor], path: Path) -> float:
    """Run an exported graph in ONNX Runtime and in PyTorch on the same inputs.

    Returns:
        The largest absolute difference over all outputs.

    Raises:
        ExportError: an output departs by more than the tolerance, or is not finite; names the output.
        BackendError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "the check after export needs ONNX Runtime; install tc-deploy[cpu] (or [cuda]), or pass --no-check"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {name: example[name].numpy() for name in graph.input_names}
    found = session.run(list(graph.output_names), feed)
    with torch.no_grad():
        expected = graph(*(example[name] for name in graph.input_names))
    worst = 0.0
    for name, mine, theirs in zip(graph.output_names, found, expected, strict=True):
        error = float(np.abs(mine - theirs.numpy()).max())
        allowed = RELATIVE_TOLERANCE * max(float(theirs.std()), 1e-3)
        if not math.isfinite(error) or error > allowed:
            raise ExportError(
                f"{path.name}: output {name} departs from PyTorch by {error:.2e}, allowed {allowed:.2e};"
                " the bundle was not written"
            )
        worst = max(worst, error)
    return worst
