"""What is not finite is never handed out: refused where it enters, and named by its step where it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from bundles import Made, MadeByCommands, run_cli, seal

import tc_deploy
from tc_deploy import Pipeline
from tc_deploy.errors import NotFiniteError, UsageError
from tc_deploy.manifest import RUNTIME_TABLES

SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def pipeline(mixed: Made) -> Pipeline:
    return tc_deploy.load(mixed.bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": np.full(SHAPE, np.nan)}, "latents: hold values that are not finite in float32"),
        ({"latents": np.full(SHAPE, np.inf, np.float32)}, "latents: hold values that are not finite in float32"),
        ({"latents": np.full(SHAPE, 1e39)}, "latents: hold values that are not finite in float32"),
        ({"latents": [[1.0], [1.0, 2.0]]}, "latents: expected an array of numbers"),
        ({"guidance_scale": 1e39}, r"guidance scale must be a number from 0 to 1000, found 1e\+39"),
        ({"guidance_scale": True}, "guidance scale must"),
        ({"guidance_scale": np.float64(1e300)}, "guidance scale must"),
        ({"seed": 2**64 - 1, "class_labels": [1, 2]}, "seed must lie in .*picture i has seed \\+ i and there are 2"),
        ({"seed": True}, "seed must be a whole number, found True"),
        ({"class_labels": [True]}, "class label must be a whole number, found True"),
        ({"class_labels": None, "conditions": [1]}, "conditions must be arrays by name, found list"),
        ({"class_labels": None, "conditions": {1: 2}}, "conditions must be arrays by name"),
        ({"class_labels": None, "conditions": {"class_labels": [[1], [1, 2]]}}, "class_labels: expected an array"),
    ],
)
def test_what_does_not_fit_float32_is_refused_before_anything_runs(
    pipeline: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    ran: list[int] = []
    with pytest.raises(UsageError, match=message):
        pipeline(**{"class_labels": [1]} | arguments, on_step=lambda first, step: ran.append(first))
    assert ran == []


def test_the_largest_seeds_still_make_pictures(pipeline: Pipeline) -> None:
    assert len(pipeline(class_labels=[1, 2], seed=2**64 - 2).latents) == 2


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_comes_to_nothing_says_at_which_step(pipeline: Pipeline, full: bool) -> None:
    request: dict[str, Any] = {"class_labels": [1], "latents": np.full(SHAPE, 3e38, np.float32), "full": full}
    # What a step leaves, looked at from outside: the same run without the check.
    with Pipeline(pipeline.path, check_finite=False) as unchecked:
        seen = [step.index for step in unchecked.steps(**request) if not np.isfinite(step.read_latents()).all()]
    with pytest.raises(NotFiniteError, match=rf"not finite from step {seen[0]} on \(steps count from 0 to 9\)"):
        pipeline(**request)
    with pytest.raises(NotFiniteError, match=rf"from step {seen[0]} on"):
        pipeline(**request, should_cancel=lambda: False)
    with pytest.raises(NotFiniteError, match=rf"from step {seen[0]} on"):
        [step.read_latents() for step in pipeline.steps(**request)]
    with pytest.raises(NotFiniteError, match=rf"from step {seen[0]} on"):
        list(pipeline.steps(**request))


def test_the_next_request_is_as_if_nothing_had_happened(pipeline: Pipeline) -> None:
    before = pipeline(class_labels=[3], seed=5).latents
    with pytest.raises(NotFiniteError):
        pipeline(class_labels=[1], latents=np.full(SHAPE, 3e38, np.float32))
    assert np.array_equal(pipeline(class_labels=[3], seed=5).latents, before)


def test_a_picture_that_comes_to_nothing_is_not_written(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    tables = safetensors.numpy.load_file(bundle / RUNTIME_TABLES)
    tables["coefficients"][:] *= np.float32(1e20)
    (bundle / RUNTIME_TABLES).write_bytes(safetensors.numpy.save(tables))
    seal(bundle)
    answer = run_cli("generate", bundle, "--class-label", 1, "-o", tmp_path / "latents.safetensors")
    assert answer.code == NotFiniteError.exit_code
    assert "not finite from step" in answer.error
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_latents_that_the_first_noise_level_takes_out_of_float32_are_refused(pixel: MadeByCommands) -> None:
    with tc_deploy.load(pixel.bundle) as loaded:
        largest = np.finfo(np.float32).max / loaded.manifest.solver.init_noise_sigma
        assert largest < 1e38
        latents = np.full((1, *loaded.manifest.latent_shape), 1.01 * largest, np.float32)
        with pytest.raises(UsageError, match="latents: hold values that are not finite in float32"):
            loaded(class_labels=[1], latents=latents)
