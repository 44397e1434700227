"""No tensor is made on the CPU where a model runs elsewhere: shown without a GPU, on PyTorch's device without data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
import zoo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tc_deploy.calibrate.prompts import draw_batch
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.tokencache.forward import run_cached, run_full, run_superposed
from tc_deploy.tokencache.predictor import CachePredictor
from tc_deploy.tokencache.sampler import Sampling, denoise
from tc_deploy.types import Attention, Reuse

ELSEWHERE = torch.device("meta")
KEEP = 8
SCHEDULERS = (
    diffusers.DDIMScheduler(clip_sample=False),
    diffusers.EulerDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
)


class OneDevice(TorchDispatchMode):
    """Refuses what CUDA would: an operation on tensors of two devices, of which scalars alone may lie on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}
        # Copies are what crosses from one to another.
        if len(devices) > 1 and func.overloadpacket is not torch.ops.aten.copy_:
            raise AssertionError(f"{func} on tensors of {' and '.join(sorted(devices))}")
        return func(*args, **kwargs)


def _elsewhere(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(ELSEWHERE) for name, value in tensors.items()}


@pytest.fixture(params=zoo.NAMES)
def model(request: pytest.FixtureRequest) -> DiffusionTransformer:
    here = zoo.model(request.param)
    return dataclasses.replace(here, module=copy.deepcopy(here.module).to(ELSEWHERE))


@torch.no_grad()
def test_every_pass_stays_on_the_model_s_device(model: DiffusionTransformer) -> None:
    inputs = _elsewhere(zoo.inputs_of(model, 2, seed=0))
    blocks = len(model.blocks)
    for reuse in Reuse:
        for attention in Attention:
            cache = CacheRecord(
                reuse=reuse, attention=attention, forecast_order=1, keep_counts=((KEEP,) * blocks, (0,) * blocks)
            )
            with OneDevice():
                output, noted = run_full(model, cache, inputs)
                weights = torch.ones(2, 2, device=ELSEWHERE)
                row = model.index_row(torch.zeros(KEEP * blocks, dtype=torch.int32, device=ELSEWHERE), 2)
                kept = run_cached(model, cache, 1, inputs, [noted] * 2, weights, row)
                importance = torch.ones(blocks, model.geometry.tokens, device=ELSEWHERE)
                superposed = run_superposed(model, cache, inputs, [noted] * 2, weights, importance)
            assert {output.device, kept.device, superposed.device} == {ELSEWHERE}


def test_both_halves_of_guidance_stay_there(model: DiffusionTransformer) -> None:
    conditions = _elsewhere(model.random_conditions(2, torch.Generator().manual_seed(0)))
    with OneDevice():
        both = model.with_unconditional(conditions)
    assert all(value.device == ELSEWHERE for value in both.values())


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_sampling_run_stays_there(scheduler: Any) -> None:
    here = zoo.model("dit")
    model = dataclasses.replace(here, module=copy.deepcopy(here.module).to(ELSEWHERE))
    sampling = Sampling(scheduler=scheduler, steps=4, guidance_scale=2.0, set_timesteps_kwargs={})
    noise, conditions = draw_batch(model, sampling, range(2))
    seen: list[torch.device] = []
    # What has no data cannot come back to the CPU, which is the last thing that a run does.
    with OneDevice(), pytest.raises(NotImplementedError, match="no data"):
        denoise(
            model,
            sampling,
            noise,
            conditions,
            lambda _, inputs: model.forward(inputs),
            lambda step, inputs, latents: seen.append(latents.device),
        )
    assert seen == [ELSEWHERE] * 4


def test_the_predictor_stays_there() -> None:
    predictor = CachePredictor(blocks=2, tokens=4, largest_timestep=999.0, keep_ratio=0.5).to(ELSEWHERE)
    with OneDevice():
        assert predictor(torch.zeros((), device=ELSEWHERE)).device == ELSEWHERE


def test_the_check_can_fail() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="cpu and meta"):
        torch.zeros(2, device=ELSEWHERE) + torch.zeros(2)
