"""A model that runs on another device computes what it does on the CPU: shown without a GPU, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from elsewhere import DEVICE, elsewhere, moved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tc_deploy.models.family import DiffusionTransformer, call_diffusers
from tc_deploy.models.scaling import by_moments
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.forward import run_cached, run_full, run_superposed
from tc_deploy.tokencache.predictor import CachePredictor
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.tokencache.selection import spread_importance, token_index_from_importance
from tc_deploy.types import Attention, Reuse

KEEP = 8
SCHEDULERS = (
    diffusers.DDIMScheduler(clip_sample=False),
    diffusers.EulerDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
)


@pytest.fixture(autouse=True)
def _one_kernel() -> Iterator[None]:
    """Which one attention takes depends on the device."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in tensors.items()}


def _cache(
    model: DiffusionTransformer, reuse: Reuse = Reuse.BRANCH, attention: Attention = Attention.ALL
) -> CacheRecord:
    blocks = len(model.blocks)
    keep_counts = ((KEEP,) * blocks, (0,) * blocks)
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=1, keep_counts=keep_counts)


def _passes(model: DiffusionTransformer, cache: CacheRecord, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """A full pass, a cached one with kept tokens and one that mixes."""
    blocks, device = len(model.blocks), inputs["timestep"].device
    weights = torch.tensor([[1.5, -0.5]] * 2, device=device)
    kept = torch.arange(KEEP * blocks, dtype=torch.int32, device=device) % model.geometry.tokens
    importance = torch.linspace(0, 1, blocks * model.geometry.tokens, device=device).reshape(blocks, -1)
    with torch.no_grad():
        output, noted = run_full(model, cache, inputs)
        earlier = {name: 0.9 * value for name, value in noted.items()}
        history = [noted, earlier]
        cached = run_cached(model, cache, 1, inputs, history, weights, model.index_row(kept, 2))
        mixed = run_superposed(model, cache, inputs, history, weights, importance)
    return [output, cached, mixed]


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("reuse", Reuse)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_pass_computes_the_same_there(name: str, reuse: Reuse, attention: Attention) -> None:
    model = zoo.model(name)
    cache = _cache(model, reuse, attention)
    inputs = zoo.inputs_of(model, 2, seed=0)
    here = _passes(model, cache, inputs)
    with elsewhere():
        there = _passes(moved(model), cache, _there(inputs))
        assert {output.device for output in there} == {DEVICE}
        there = [output.cpu() for output in there]
    for mine, expected in zip(there, here, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_a_guided_run_makes_the_same_pictures_there(scheduler: Any) -> None:
    here = zoo.model("dit")
    sampling = Sampling(scheduler=scheduler, steps=5, guidance_scale=2.0, set_timesteps_kwargs={})
    schedule = tprr(steps=5, phase_start=5, cache_interval_early=2, cache_interval_late=1)
    blocks, tokens = len(here.blocks), here.geometry.tokens
    cache = _cache(here)
    importance = np.stack([spread_importance(blocks, tokens, step) for step in range(5)])
    index = token_index_from_importance(importance, cache.keep_counts, schedule)
    tables = StepTables.polynomial(schedule, cache.forecast_order, index)
    noise, conditions = draw_batch(here, sampling, range(2))

    def run(model: DiffusionTransformer) -> Tensor:
        return denoise(model, sampling, noise, conditions, TokenCachedSteps(model, cache, schedule, tables))

    expected = run(here)
    with elsewhere():
        found = run(moved(here))
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


def test_the_predictor_scores_the_same_there() -> None:
    predictor = CachePredictor(blocks=2, tokens=4, largest_timestep=999.0, keep_ratio=0.5)
    expected = predictor(torch.tensor(500.0)).detach()
    with elsewhere(), torch.no_grad():
        assert torch.equal(predictor.to(DEVICE)(torch.tensor(500.0, device=DEVICE)).cpu(), expected)


def test_latents_are_unscaled_there() -> None:
    config = {"latents_mean": [0.5, -0.5], "latents_std": [2.0, 3.0]}
    latents = torch.ones(1, 2, 3, 4, 4)
    with elsewhere():
        assert torch.equal(by_moments(latents.to(DEVICE), config).cpu(), by_moments(latents, config))


# ---------------------------------------------------------------------------------------------------- the device itself


def _rotary_on_the_cpu(module: Any, inputs: Mapping[str, Any], geometry: Any) -> Tensor:
    """FLUX's call as it once was. diffusers moves the tables that it makes of these, so a full step gets by."""
    ids = {"img_ids": torch.zeros(geometry.tokens, 3), "txt_ids": torch.zeros(geometry.text_tokens, 3)}
    return call_diffusers(module, {**inputs, **ids}, geometry)


def test_positions_made_on_the_cpu_are_refused() -> None:
    model = zoo.model("flux")
    model = dataclasses.replace(model, family=dataclasses.replace(model.family, call=_rotary_on_the_cpu))
    inputs = zoo.inputs_of(model, 2, seed=0)
    _passes(model, _cache(model), inputs)
    with elsewhere(), pytest.raises(AssertionError, match=r"index_select.* two devices"):
        _passes(moved(model), _cache(model), _there(inputs))


def test_what_cuda_refuses_is_refused() -> None:
    here = torch.ones(2)
    with elsewhere():
        there = here.to(DEVICE)
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0]
        with pytest.raises(AssertionError, match="two devices"):
            there + here
        with pytest.raises(AssertionError, match="two devices"):
            torch.stack([there[0], here[0]])
        with pytest.raises(AssertionError, match="two devices"):
            there[torch.tensor([0])]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(AssertionError, match="draws"):
            torch.randn(2, device=DEVICE)
