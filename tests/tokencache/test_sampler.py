"""Whole trajectories: the plain diffusers loop under full steps, a loop written out by hand under a schedule."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tokencache import reference
from tolerances import tolerance
from torch import Tensor

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import full_schedule, tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import Attention, IntArray, Reuse

STEPS, BATCH, TOKENS = 9, 2, 16
SCHEDULE = tprr(steps=STEPS, phase_start=4, cache_interval_early=2, cache_interval_late=3)
VARIANTS = (0, 1, 0, 1, 0, 2, 2, 0, 2)
KEEP_COUNTS = ((0, 5, TOKENS), (3, 0, 9))
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_cache(reuse: Reuse = Reuse.BRANCH, attention: Attention = Attention.ALL, order: int = 1) -> CacheRecord:
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=KEEP_COUNTS)


def make_sampling(scheduler: str = "ddim", guidance_scale: float | None = None, steps: int = STEPS) -> Sampling:
    return Sampling(
        scheduler=SCHEDULERS[scheduler](), steps=steps, guidance_scale=guidance_scale, set_timesteps_kwargs={}
    )


def make_index(seed: int = 0) -> dict[int, IntArray]:
    """Per phase, a row for each of its cached steps, none like another."""
    generator = np.random.default_rng(seed)

    def row(counts: tuple[int, ...]) -> list[int]:
        return [
            token
            for keep in counts
            if 0 < keep < TOKENS
            for token in sorted(generator.choice(TOKENS, keep, replace=False))
        ]

    return {
        phase: np.array([row(KEEP_COUNTS[phase - 1]) for _ in range(VARIANTS.count(phase))], np.int32)
        for phase in (1, 2)
    }


def make_tables() -> StepTables:
    return StepTables.polynomial(SCHEDULE, 2, make_index())


def draw(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    noise = torch.randn((BATCH, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    return noise, {"class_labels": torch.tensor([3, 8], dtype=torch.int32)}


def plain_loop(
    module: Any, scheduler: Any, noise: Tensor, labels: Tensor, guidance_scale: float | None, steps: int = STEPS
) -> Tensor:
    """What diffusers' own DiT pipeline does."""
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    if guidance_scale is not None:
        labels = torch.cat([labels, torch.full_like(labels, 10)])
    for t in scheduler.timesteps:
        batch = latents if guidance_scale is None else torch.cat([latents, latents])
        batch = scheduler.scale_model_input(batch, t)
        output = module(batch, timestep=t.float().repeat(len(batch)), class_labels=labels.long()).sample[:, :4]
        if guidance_scale is not None:
            conditional, unconditional = output[:BATCH], output[BATCH:]
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents


# ----------------------------------------------------------------------------------------------------------- full steps
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 4.0])
def test_denoising_is_diffusers_own_loop_bit_for_bit(
    tiny_dit: DiffusionTransformer, scheduler: str, guidance_scale: float | None
) -> None:
    noise, conditions = draw()
    sampling = make_sampling(scheduler, guidance_scale)
    latents = denoise(tiny_dit, sampling, noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))
    expected = plain_loop(tiny_dit.module, SCHEDULERS[scheduler](), noise, conditions["class_labels"], guidance_scale)
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("reuse", tuple(Reuse))
@pytest.mark.parametrize("attention", tuple(Attention))
@pytest.mark.parametrize("guidance_scale", [None, 4.0])
def test_a_schedule_of_full_steps_is_diffusers_own_loop_bit_for_bit(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, guidance_scale: float | None
) -> None:
    noise, conditions = draw()
    steps = TokenCachedSteps(
        tiny_dit, make_cache(reuse, attention), full_schedule(STEPS), StepTables.polynomial(full_schedule(STEPS), 1)
    )
    latents = denoise(tiny_dit, make_sampling(guidance_scale=guidance_scale), noise, conditions, steps)
    expected = plain_loop(tiny_dit.module, SCHEDULERS["ddim"](), noise, conditions["class_labels"], guidance_scale)
    assert torch.equal(latents, expected)


# --------------------------------------------------------------------------------------------------------- cached steps
def extrapolation(step: int, nodes: list[int]) -> list[float]:
    """Weights of the values at ``nodes`` in the polynomial through them, at ``step``: moments that must agree."""
    powers = np.arange(len(nodes))[:, None]
    return list(np.linalg.solve(np.array(nodes, float)[None] ** powers, (float(step) ** powers)[:, 0]))


@pytest.mark.parametrize("reuse", tuple(Reuse))
@pytest.mark.parametrize("attention", tuple(Attention))
@pytest.mark.parametrize("order", range(3))
def test_steps_under_a_schedule_are_the_loop_written_by_hand(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int
) -> None:
    index = make_index()
    steps = TokenCachedSteps(
        tiny_dit, make_cache(reuse, attention, order), SCHEDULE, StepTables.polynomial(SCHEDULE, order, index)
    )
    rows = {1: iter(index[1]), 2: iter(index[2])}
    noted: list[tuple[int, reference.Noted]] = []
    for step, variant in enumerate(VARIANTS):
        noise, conditions = draw(seed=step)
        inputs = {"hidden_states": noise, "timestep": torch.tensor([900.0 - 90 * step, 40.0 * step]), **conditions}
        kept = cached = None
        if variant:
            latest = noted[: order + 1]
            weights = extrapolation(step, [node for node, _ in latest])
            cached = reference.combined([values for _, values in latest], torch.tensor([weights] * BATCH).float())
            kept = masks_of(next(rows[variant]), KEEP_COUNTS[variant - 1])
        expected, values = reference.step(
            tiny_dit.module,
            inputs,
            kept,
            cached,
            residual=reuse is Reuse.RESIDUAL,
            keys=attention is Attention.ALL,
        )
        if not variant:
            noted.insert(0, (step, values))
        error = float((steps(step, inputs) - expected).abs().max())
        assert error <= tolerance("torch", "fp32", "extrapolated_max_abs"), f"step {step}"


def masks_of(row: IntArray, keep_counts: tuple[int, ...]) -> list[Tensor]:
    masks, start = [], 0
    for keep in keep_counts:
        mask = torch.full((BATCH, TOKENS), keep == TOKENS)
        if 0 < keep < TOKENS:
            mask[:, torch.from_numpy(row[start : start + keep]).long()] = True
            start += keep
        masks.append(mask)
    return masks


@pytest.mark.parametrize("guidance_scale", [None, 4.0])
def test_a_trajectory_does_not_remember_the_one_before(
    tiny_dit: DiffusionTransformer, guidance_scale: float | None
) -> None:
    sampling = make_sampling(guidance_scale=guidance_scale)
    steps = TokenCachedSteps(tiny_dit, make_cache(order=2), SCHEDULE, make_tables())
    first = denoise(tiny_dit, sampling, *draw(0), steps)
    other = denoise(tiny_dit, sampling, *draw(1), steps)
    assert torch.equal(denoise(tiny_dit, sampling, *draw(0), steps), first)
    assert not torch.equal(other, first)
    fresh = TokenCachedSteps(tiny_dit, make_cache(order=2), SCHEDULE, make_tables())
    assert torch.equal(denoise(tiny_dit, sampling, *draw(1), fresh), other)


def test_a_trajectory_may_have_another_batch_than_the_one_before(tiny_dit: DiffusionTransformer) -> None:
    noise, conditions = draw()
    steps = TokenCachedSteps(tiny_dit, make_cache(order=2), SCHEDULE, make_tables())
    denoise(tiny_dit, make_sampling(guidance_scale=4.0), noise, conditions, steps)
    after = denoise(tiny_dit, make_sampling(), noise, conditions, steps)
    fresh = TokenCachedSteps(tiny_dit, make_cache(order=2), SCHEDULE, make_tables())
    assert torch.equal(after, denoise(tiny_dit, make_sampling(), noise, conditions, fresh))


def test_guidance_is_a_mix_of_two_runs_of_the_model(tiny_dit: DiffusionTransformer) -> None:
    noise, conditions = draw()
    seen: list[Mapping[str, Tensor]] = []

    def forward(step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        seen.append(inputs)
        return tiny_dit.forward(inputs)

    denoise(tiny_dit, make_sampling(guidance_scale=4.0), noise, conditions, forward)
    assert len(seen) == STEPS
    for inputs in seen:
        conditional, unconditional = inputs["hidden_states"].chunk(2)
        assert torch.equal(conditional, unconditional)
        assert inputs["class_labels"].tolist() == [3, 8, 10, 10]
        assert inputs["timestep"].shape == (2 * BATCH,)
    seen.clear()
    denoise(tiny_dit, make_sampling(), noise, conditions, forward)
    assert [len(inputs["hidden_states"]) for inputs in seen] == [BATCH] * STEPS


def test_progress_sees_inputs_and_latents_of_every_step(tiny_dit: DiffusionTransformer) -> None:
    noise, conditions = draw()
    seen: list[tuple[int, Tensor, Tensor]] = []
    latents = denoise(
        tiny_dit,
        make_sampling(),
        noise,
        conditions,
        lambda _, inputs: tiny_dit.forward(inputs),
        lambda step, inputs, after: seen.append((step, inputs["hidden_states"], after)),
    )
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert torch.equal(seen[0][1], noise)
    assert all(torch.equal(before[2], after[1]) for before, after in pairwise(seen))
    assert torch.equal(seen[-1][2], latents)


def test_the_callers_scheduler_is_left_alone(tiny_dit: DiffusionTransformer) -> None:
    sampling = make_sampling("dpm")
    before = sampling.scheduler.timesteps.clone()
    first = denoise(tiny_dit, sampling, *draw(), lambda _, inputs: tiny_dit.forward(inputs))
    assert torch.equal(sampling.scheduler.timesteps, before)
    assert torch.equal(denoise(tiny_dit, sampling, *draw(), lambda _, inputs: tiny_dit.forward(inputs)), first)


def test_no_graph_is_kept_of_a_run(tiny_dit: DiffusionTransformer) -> None:
    parameter = next(tiny_dit.module.parameters())
    noise = torch.randn(BATCH, *tiny_dit.geometry.latent_shape)
    conditions = tiny_dit.random_conditions(BATCH, torch.Generator().manual_seed(0))
    parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            latents = denoise(tiny_dit, make_sampling(), noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))
    finally:
        parameter.requires_grad_(False)
    assert not latents.requires_grad
