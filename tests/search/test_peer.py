import dataclasses
import importlib.util
import io
import logging
import sys
from collections.abc import Mapping

import pytest
import torch
import zoo
from torch import Tensor

from tc_deploy.bench.interleave import interleaved
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model, load_scheduler
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.search.peer import PeerSetting, cache_dit_runs, why_no_peer
from tc_deploy.tokencache.sampler import Sampling, denoise

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="needs cache-dit")

STEPS = 8
NEVER = PeerSetting(threshold=0.0, warmup=1, in_a_row=-1, order=0)
ALWAYS = PeerSetting(threshold=1.0, warmup=4, in_a_row=-1, order=0)
IN_TURN = PeerSetting(threshold=1.0, warmup=4, in_a_row=1, order=0)
FORECAST = PeerSetting(threshold=1.0, warmup=4, in_a_row=1, order=1)


@pytest.fixture
def model(tiny_dit_folder) -> DiffusionTransformer:
    """One of its own, as the tests look at whether it stays as it was."""
    return load_model(tiny_dit_folder)


@pytest.fixture
def sampling(tiny_dit_folder) -> Sampling:
    scheduler = load_scheduler(tiny_dit_folder)
    return Sampling(scheduler=scheduler, steps=STEPS, guidance_scale=2.0, set_timesteps_kwargs={})


@pytest.fixture
def drawn(model, sampling) -> tuple[Tensor, dict[str, Tensor]]:
    return draw_batch(model, sampling, range(3))


def full_run(
    model: DiffusionTransformer, sampling: Sampling, noise: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    return denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))


@pytest.fixture
def runs(model, sampling, tmp_path):
    """Runs settings on noise and conditions, and keeps nothing from one test to the next."""

    def run(drawn, *settings, batch_size=3, rounds=0, kept=tmp_path / "kept", **arguments):
        numbers = {"batch_size": batch_size, "rounds": rounds}
        return cache_dit_runs(model, sampling, *drawn, **numbers, kept=kept, settings=settings, **arguments)

    return run


def test_with_the_cache_off_it_is_the_full_run_to_the_bit(model, sampling, drawn, runs):
    (run,) = runs(drawn, NEVER)
    assert torch.equal(run.latents, full_run(model, sampling, *drawn))
    assert (run.steps_full, run.steps_cached, run.cost_in_full_steps) == (STEPS, 0, STEPS)


def test_the_model_stays_as_it_was(model, sampling, drawn, runs):
    before = full_run(model, sampling, *drawn)
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    attributes, submodules = set(vars(model.module)), [name for name, _ in model.module.named_modules()]
    runs(drawn, FORECAST)
    after = model.module.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert set(vars(model.module)) == attributes
    assert [name for name, _ in model.module.named_modules()] == submodules
    assert torch.equal(full_run(model, sampling, *drawn), before)


def test_steps_are_counted_and_cost_one_block_of_three_when_cached(model, sampling, drawn, runs):
    always, in_turn = runs(drawn, ALWAYS, IN_TURN)
    assert (always.steps_full, always.steps_cached) == (4, 4)
    assert (in_turn.steps_full, in_turn.steps_cached) == (6, 2)
    cached_step = (always.cost_in_full_steps - always.steps_full) / always.steps_cached
    assert 1 / 3 < cached_step < 0.45  # embeddings and head are computed too
    assert in_turn.cost_in_full_steps == pytest.approx(6 + 2 * cached_step)
    assert not torch.equal(always.latents, in_turn.latents)


def test_forecasting_changes_the_pictures_and_not_the_steps(model, sampling, drawn, runs):
    reused, forecast = runs(drawn, IN_TURN, FORECAST)
    assert (forecast.steps_full, forecast.steps_cached) == (reused.steps_full, reused.steps_cached)
    assert not torch.equal(forecast.latents, reused.latents)


def test_no_run_knows_of_the_one_before(model, sampling, drawn, runs):
    noise, conditions = drawn
    twice = torch.cat([noise, noise]), {name: torch.cat([given, given]) for name, given in conditions.items()}
    (run,) = runs(twice, FORECAST)
    first, again = run.latents.chunk(2)
    assert torch.equal(first, again)


def test_every_sample_is_made_in_batches_of_the_size_that_is_timed(model, sampling, drawn, runs):
    done = []
    (run,) = runs(drawn, ALWAYS, batch_size=2, rounds=2, progress=lambda made, total: done.append((made, total)))
    assert run.latents.shape == drawn[0].shape
    assert run.latency_ratio > 0
    assert done == [(made, 6) for made in range(2, 7)]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_that_the_noise_does_not_fill_is_filled_up_from_its_start(drawn, runs, batch_size):
    noise, conditions = drawn
    rows = torch.arange(6) % 3
    twice = noise[rows], {name: given[rows] for name, given in conditions.items()}
    (run,) = runs(drawn, FORECAST, batch_size=batch_size)
    (whole,) = runs(twice, FORECAST, batch_size=batch_size)
    assert torch.equal(run.latents, whole.latents[:3])


def test_without_rounds_nothing_is_timed(drawn, runs, monkeypatch):
    monkeypatch.setattr("tc_deploy.search.in_pytorch.interleaved", None)
    (run,) = runs(drawn, ALWAYS)
    assert run.latency_ratio is None
    assert run.latency_iqr is None


def test_pytorch_is_warm_when_it_is_timed(drawn, runs, monkeypatch):
    seen = []

    def counting(actions, rounds, *more):
        seen.append((len(actions), rounds))
        return interleaved(actions, rounds, *more)

    monkeypatch.setattr("tc_deploy.search.in_pytorch.interleaved", counting)
    runs(drawn, ALWAYS, rounds=3)
    assert seen == [(2, 1), (2, 3)]


def test_what_was_kept_runs_no_more(drawn, runs, monkeypatch):
    before = runs(drawn, ALWAYS, FORECAST, rounds=2)
    calls = []
    monkeypatch.setattr("tc_deploy.search.peer.sample", lambda *arguments: calls.append(arguments))
    after = runs(drawn, ALWAYS, FORECAST, rounds=2)
    assert not calls
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert dataclasses.replace(one, latents=other.latents) == other


def test_cache_dit_does_not_write_to_the_terminal(model, sampling, drawn, runs, monkeypatch):
    import cache_dit  # makes the handler that all its loggers share

    terminal = logging.getLogger("CACHE_DIT").handlers[0]
    monkeypatch.setattr(terminal, "stream", io.StringIO())
    runs(drawn, FORECAST)
    assert terminal.stream.getvalue() == ""
    cache_dit.disable_cache(model.module)
    assert "disabled" in terminal.stream.getvalue()  # it may write again


def test_without_cache_dit_there_is_a_reason_and_no_run(model, sampling, drawn, runs, monkeypatch):
    assert why_no_peer() is None
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    assert "cache_dit is not installed: pip install 'cache-dit>=" in why_no_peer()
    assert runs(drawn, ALWAYS) == ()


def test_a_model_that_cache_dit_does_not_know_is_named_and_not_run(sampling, tmp_path):
    model = zoo.model("sd3")
    assert why_no_peer(model).endswith("does not know SD3Transformer2DModel")
    numbers = {"batch_size": 1, "rounds": 0}
    assert cache_dit_runs(model, sampling, *draw_batch(model, sampling, [0]), **numbers, kept=tmp_path) == ()
