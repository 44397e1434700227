"""The latents after every step of a sampling run, on the host: what engines' own are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import Plan
from tc_deploy.tokencache.forward import run_full
from tc_deploy.tokencache.sampler import Sampling, StepFunction, denoise
from tc_deploy.types import FloatArray


def full_latents(
    model: DiffusionTransformer, plan: Plan, sampling: Sampling, noise: Tensor, conditions: Mapping[str, Tensor]
) -> FloatArray:
    """The latents after each step with every step full, (T, B, C, H, W)."""
    return latents_of(model, sampling, noise, conditions, lambda step, inputs: run_full(model, plan.cache, inputs)[0])


def latents_of(
    model: DiffusionTransformer,
    sampling: Sampling,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    step_function: StepFunction,
) -> FloatArray:
    """The latents after each step of a sampling run, (T, B, C, H, W)."""
    latents: list[FloatArray] = []
    denoise(
        model,
        sampling,
        noise,
        conditions,
        step_function,
        lambda step, inputs, after: latents.append(after.detach().cpu().numpy().copy()),
    )
    return np.stack(latents)
