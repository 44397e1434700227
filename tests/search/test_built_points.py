"""Points as engines: what is taken from the last one, what stays on disk, and what pictures are asked for by."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from bundles import SaveDit
from tolerances import tolerance

from tc_deploy.backends.tensorrt.backend import TensorRtOptions
from tc_deploy.export.graphs import onnx_from_graph
from tc_deploy.models.loading import load_model
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.planned.prompts import tensors_of
from tc_deploy.runtime.request import noise_of
from tc_deploy.schedule import Schedule
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.built_points import IMAGE_BATCH, PointMaker, asked_conditions
from tc_deploy.search.record import Kind
from tc_deploy.tables import FORECAST_WEIGHTS
from tc_deploy.tokencache.graphs import ModelGraph
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import Attention, Reuse, Skip

LISTS = ((1, 1, 0), (0, 1, 1))
"""What follows the first step in a run of four."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_dit: SaveDit) -> Path:
    """One block, for quick exports."""
    return save_dit(tmp_path_factory.mktemp("one-block") / "model", num_layers=1)


@pytest.fixture(scope="module")
def baselines(checkpoint: Path) -> Baselines:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    sampling = Sampling(scheduler=scheduler, steps=4, guidance_scale=None, set_timesteps_kwargs={})
    return Baselines(load_model(checkpoint), sampling, 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bundles stay from test to test, as from one run of a search to the next."""
    return tmp_path_factory.mktemp("work")


def test_plans_that_need_the_same_graphs_share_engines_and_no_graph_is_exported_twice(
    baselines: Baselines, checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []

    def export(graph: ModelGraph, *arguments: Any, **settings: Any) -> Any:
        exported.append(graph.stem)
        return onnx_from_graph(graph, *arguments, **settings)

    monkeypatch.setattr("tc_deploy.export.steps.onnx_from_graph", export)
    full = baselines.full()
    maker = PointMaker(work, checkpoint, "onnxruntime", 1, full)
    every = list(baselines.all())
    fewer = [point for point in every if point.kind is Kind.FEWER_STEPS][:2]
    reused = [point for point in every if point.kind is Kind.SKIP_REUSE][:2]
    forecast = [point for point in every if point.name.startswith("output forecast, order 1")][:2]
    paths = [maker.engines(point).path for point in (full, *fewer, *reused, *forecast)]
    assert len(set(paths)) == 3
    assert paths[0] == paths[1] == paths[2]
    assert exported == ["full", "full", "cached-1", "cached-1"]  # a full step that leaves its output is one graph
    assert {path.parent for path in work.glob("bundles/*/manifest.json")} == {paths[0], paths[-1]}
    maker.staying = {maker.graphs_key(reused[0]), maker.graphs_key(forecast[0])}
    assert maker.engines(reused[0]).path == paths[3]
    assert exported[4:] == ["cached-1"]
    assert {path.parent for path in work.glob("bundles/*/manifest.json")} == set(paths)


def test_engines_run_each_plan_by_its_own_schedule_solver_and_weights(
    baselines: Baselines, checkpoint: Path, work: Path
) -> None:
    model, maker = baselines.model, PointMaker(work, checkpoint, "onnxruntime", 1, baselines.full())
    cache = CacheRecord(
        reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=((0,), (0,)), skip=Skip.MODEL
    )
    points = [baselines.full(), *(point for point in baselines.all() if point.kind is Kind.FEWER_STEPS)][:3]
    points += [baselines.cached(Schedule(variants=(0, *rest)), cache, str(rest), Kind.SKIP_FORECAST) for rest in LISTS]
    # The same graphs and list, and weights that are no polynomial's: their column of the only full step is 1 there.
    weights = points[-1].plan.run_schedule().polynomial_weights(1)
    weights[3] = 0.25, 0.5
    points.append(replace(points[-1], tables={**points[-1].tables, FORECAST_WEIGHTS: weights}))
    asked = asked_conditions(model, baselines.sampling, range(7, 9))
    noise = torch.from_numpy(noise_of(model.geometry.latent_shape, 7, 2))
    for number, point in enumerate(points):
        plan = point.plan
        with maker.pipeline(point, 2) as pipeline:
            found = pipeline(conditions=asked.given, latents=noise.numpy()).latents
        steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(point.tables))
        expected = denoise(model, sampling_from_plan(plan), noise, tensors_of(asked), steps)
        error = np.abs(found - expected.numpy()).max() / expected.abs().max()
        assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel"), number


def test_a_latency_that_was_disturbed_is_measured_again_and_the_calmest_counts(
    baselines: Baselines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [point for point in baselines.all() if point.kind is Kind.FEWER_STEPS][:2]
    calm, wild = (point.name for point in points)
    full_ms = [10.0, 10.0, 10.0]
    answers = [
        (full_ms, {calm: [5.0, 5.0, 5.0], wild: [2.0, 9.0, 4.0]}),
        (full_ms, {wild: [3.0, 3.4, 3.0]}),
        (full_ms, {wild: [4.0, 9.0, 1.0]}),
    ]
    asked: list[list[str]] = []

    def times(_: Any, others: Any, *__: Any) -> Any:
        asked.append(list(others))
        return answers[len(asked) - 1]

    monkeypatch.setattr("tc_deploy.search.built_points.times_in_turn", times)
    monkeypatch.setattr(PointMaker, "pipeline", lambda *_: contextlib.nullcontext())
    maker = PointMaker(tmp_path, tmp_path, "onnxruntime", 1, baselines.full())
    found = maker.latencies(points, 3)
    assert asked == [[calm, wild], [wild]]
    assert (found[calm].ratio, found[wild].ratio) == (0.5, 0.3)
    assert maker.latencies(points, 3) == found  # which is kept
    assert len(asked) == 2


def test_tensorrt_is_built_for_the_batch_that_is_timed(baselines: Baselines, tmp_path: Path) -> None:
    for batch_size in (1, 20):
        maker = PointMaker(tmp_path, tmp_path, "tensorrt-rtx", batch_size, baselines.full())
        options = TensorRtOptions.model_validate(maker.build_options())
        assert options.batch_profile == (1, batch_size, max(batch_size, IMAGE_BATCH))
    assert PointMaker(tmp_path, tmp_path, "openvino", 20, baselines.full()).build_options() == {}


def test_a_model_that_takes_prompts_is_asked_with_both_halves_and_runs_as_in_pytorch(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    zoo.save("sd3", checkpoint / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(checkpoint / "scheduler")
    model = load_model(checkpoint, zoo.MODELS["sd3"][2])
    sampling = Sampling(scheduler=scheduler, steps=3, guidance_scale=1.5, set_timesteps_kwargs={})
    full = Baselines(model, sampling, 0).full()
    maker = PointMaker(tmp_path / "work", checkpoint, "onnxruntime", 1, full)
    asked = asked_conditions(model, sampling, range(7, 9))
    made = maker.images(full, asked, 7)
    noise = torch.from_numpy(noise_of(model.geometry.latent_shape, 7, 2))
    expected = denoise(model, sampling, noise, tensors_of(asked), lambda _, inputs: model.forward(inputs))
    error = np.abs(made.latents - expected.numpy()).max() / expected.abs().max()
    assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")
