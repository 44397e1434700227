"""Points as engines: what is taken from the last one, what stays on disk, and what pictures are asked for by."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from tolerances import tolerance

from tc_deploy.backends.tensorrt.backend import TensorRtOptions
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import read_target
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.planned.prompts import tensors_of
from tc_deploy.runtime.request import noise_of
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.built_points import IMAGE_BATCH, PlannedPoint, PointMaker, asked_conditions
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling, denoise


@pytest.fixture
def baselines(tiny_dit: DiffusionTransformer) -> Baselines:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    sampling = Sampling(scheduler=scheduler, steps=4, guidance_scale=None, set_timesteps_kwargs={})
    return Baselines(tiny_dit, sampling, 0)


def test_one_bundle_beside_the_full_runs_and_graphs_that_are_alike_exported_once(
    baselines: Baselines, tiny_dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[bool] = []

    def export(folder: Path, bundle: Path, options: ExportOptions) -> Any:
        exported.append(options.graphs_from is None)
        return export_bundle(folder, bundle, options)

    monkeypatch.setattr("tc_deploy.search.built_points.export_bundle", export)
    full = baselines.full()
    maker = PointMaker(tmp_path, tiny_dit_folder, "onnxruntime", 1, full)
    fewer = [point for point in baselines.all() if point.kind is Kind.FEWER_STEPS][:2]
    skipped = [point for point in baselines.all() if point.kind is Kind.SKIP_REUSE]
    points: list[PlannedPoint] = [full, *fewer, *skipped, full]  # the last of which is still there
    bundles = []
    for point in points:
        bundles.append(maker.bundle(point))
        assert read_target(bundles[-1], "onnxruntime").backend == "onnxruntime"
        built = {path.parent for path in tmp_path.glob("bundles/*/*/manifest.json")}
        assert built == {bundles[0], bundles[-1]} | (set(bundles[-2:]) if bundles[-1] == bundles[0] else set())
    assert exported == [True, False, False, True, False]


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
