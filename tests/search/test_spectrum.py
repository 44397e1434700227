"""Spectrum as published: its steps, its ridge regression, and runs that go by them."""

from pathlib import Path

import diffusers
import numpy as np
import torch

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import FULL
from tc_deploy.search.record import Kind
from tc_deploy.search.spectrum import DEGREE, LOCAL_SHARE, RIDGE, SpectrumSetting, spectrum_runs, spectrum_weights
from tc_deploy.tokencache.sampler import Sampling

PUBLISHED = SpectrumSetting(warmup=5, growth=0.75)
STEPS = 8


def test_the_published_setting_calls_the_model_fourteen_times_in_fifty_steps() -> None:
    """As the paper has it for FLUX.1."""
    variants = PUBLISHED.schedule(50).variants
    full = [step for step, variant in enumerate(variants) if variant == FULL]
    assert len(full) == 14
    assert full[:8] == [0, 1, 2, 3, 4, 6, 8, 11]


def test_weights_are_those_of_a_ridge_regression_and_a_line() -> None:
    schedule = PUBLISHED.schedule(20)
    weights, rng = spectrum_weights(schedule), np.random.default_rng(0)
    full = [step for step, variant in enumerate(schedule.variants) if variant == FULL]
    outputs = rng.normal(size=(len(full), 3))
    places = np.linspace(-1, 1, 20)
    for step in (7, 12, 19):
        count = sum(node < step for node in full)
        basis = np.polynomial.chebyshev.chebvander(places[full[:count]], DEGREE)
        rows = np.concatenate([basis, np.sqrt(RIDGE) * np.eye(DEGREE + 1)])
        coefficients = np.linalg.lstsq(rows, np.concatenate([outputs[:count], np.zeros((DEGREE + 1, 3))]), rcond=None)[
            0
        ]
        spectral = np.polynomial.chebyshev.chebval(places[step], coefficients)
        last, before = full[count - 1], full[count - 2]
        slope = (outputs[count - 1] - outputs[count - 2]) / (last - before)
        line = outputs[count - 1] + slope * (step - last)
        expected = (1 - LOCAL_SHARE) * spectral + LOCAL_SHARE * line
        assert np.allclose(weights[step] @ outputs, expected, atol=1e-6)


def test_a_run_goes_by_them(tiny_dit: DiffusionTransformer, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    sampling = Sampling(scheduler=scheduler, steps=STEPS, guidance_scale=None, set_timesteps_kwargs={})
    noise, conditions = draw_batch(tiny_dit, sampling, range(3))
    setting = SpectrumSetting(warmup=3, growth=0.0)
    said: list[tuple[int, int]] = []
    settings = {
        "batch_size": 2,
        "rounds": 2,
        "kept": tmp_path,
        "settings": (setting, SpectrumSetting(warmup=8, growth=0)),
    }
    (run,) = spectrum_runs(
        tiny_dit, sampling, noise, conditions, **settings, progress=lambda done, total: said.append((done, total))
    )
    assert (run.kind, run.steps_full, run.steps_cached, run.cost_in_full_steps) == (Kind.SPECTRUM, 5, 3, 5)
    assert run.latency_ratio is not None
    assert said[-1] == (6, 6)
    schedule = setting.schedule(STEPS)
    assert schedule.variants == (0, 0, 0, 1, 0, 1, 0, 1)
    weights, outputs, latents = spectrum_weights(schedule), [], noise
    scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        if schedule.variants[step] == FULL:
            with torch.no_grad():
                inputs = {"hidden_states": latents, "timestep": timestep.expand(3), **conditions}
                outputs.append(tiny_dit.forward(inputs))
            output = outputs[-1]
        else:
            output = sum(weight * known for weight, known in zip(weights[step].tolist(), outputs, strict=False))
        latents = scheduler.step(output[:, :4], timestep, latents).prev_sample
    assert torch.allclose(run.latents, latents, atol=1e-4)
    again = spectrum_runs(tiny_dit, sampling, noise, conditions, **settings)
    assert again[0].latency_ratio == run.latency_ratio  # kept
