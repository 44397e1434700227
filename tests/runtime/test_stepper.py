"""The model's calls alone, against PyTorch's step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundles import Made, MadeByCommands
from numpy.typing import NDArray
from tolerances import tolerance

from tc_deploy.errors import BundleError, UsageError
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.stepper import Engines, Stepper
from tc_deploy.tokencache.sampler import TokenCachedSteps
from tc_deploy.types import FloatArray

BATCH = 3
STEPS = 8
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")


@pytest.fixture(scope="module")
def engines(multistep: Made) -> Engines:
    """F c1 c1 F | F c2 F c2; c2 skips the model."""
    return Engines(read_bundle(multistep.bundle, None))


def inputs(step: int, batch: int = BATCH) -> dict[str, NDArray[np.generic]]:
    latents = np.random.default_rng(step).standard_normal((batch, 4, 8, 8), dtype=np.float32)
    return {"hidden_states": latents, "class_labels": np.arange(batch, dtype=np.int32)}


def trajectory(stepper: Stepper, batch: int = BATCH) -> list[FloatArray]:
    stepper.start()
    return [stepper.step(inputs(step, batch)) for step in range(STEPS)]


def test_every_step_is_pytorch_s(multistep: Made, engines: Engines) -> None:
    plan, tables = load_plan(multistep.plan)
    model = load_model(multistep.model)
    expected = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    full = trajectory(engines.stepper(BATCH, full=True))
    for step, found in enumerate(trajectory(engines.stepper(BATCH))):
        given = {name: torch.from_numpy(value) for name, value in inputs(step).items()}
        given["timestep"] = torch.full((BATCH,), plan.sampling.timesteps[step])
        with torch.no_grad():
            plain, cached = model.forward(given).numpy(), expected(step, given).numpy()
        np.testing.assert_allclose(found, cached, rtol=0, atol=EQUAL * np.abs(cached).max())
        np.testing.assert_allclose(full[step], plain, rtol=0, atol=EQUAL * np.abs(plain).max())


def test_steppers_of_one_bundle_are_independent(engines: Engines) -> None:
    first, second = engines.stepper(BATCH), engines.stepper(BATCH)
    expected = trajectory(first)
    first.start()
    for step in range(STEPS):
        found = first.step(inputs(step))
        second.step(inputs(step + 100))
        assert np.array_equal(found, expected[step])


@pytest.mark.parametrize("after", [1, 2, 6])
def test_a_start_forgets_what_was(engines: Engines, after: int) -> None:
    stepper = engines.stepper(BATCH)
    expected = trajectory(stepper)
    stepper.start()
    for step in range(after):
        spoilt = inputs(step)
        spoilt["hidden_states"] = np.full_like(spoilt["hidden_states"], np.nan)
        stepper.step(spoilt)
    for found, right in zip(trajectory(stepper), expected, strict=True):
        assert np.array_equal(found, right)


def test_an_output_is_the_caller_s_own(engines: Engines) -> None:
    stepper = engines.stepper(BATCH)
    first = stepper.step(inputs(0))
    kept = first.copy()
    stepper.step(inputs(1))
    assert np.array_equal(first, kept)


def test_a_trajectory_ends(engines: Engines) -> None:
    stepper = engines.stepper(1)
    trajectory(stepper, 1)
    assert stepper.position == STEPS
    with pytest.raises(UsageError, match="all 8 steps of the plan have run"):
        stepper.step(inputs(0, 1))


def test_a_batch_that_the_graphs_do_not_take_is_refused(engines: Engines, pixel: MadeByCommands) -> None:
    assert engines.static_batch is None
    with pytest.raises(UsageError, match="a batch of at least 1"):
        engines.stepper(0)
    static = Engines(read_bundle(pixel.bundle, "onnxruntime"))
    assert static.static_batch == 2
    for batch in (1, 4):
        with pytest.raises(UsageError, match=f"a batch of exactly 2 in the model .* found {batch}; export again"):
            static.stepper(batch)


def test_a_bundle_that_is_not_built_is_refused(multistep: Made) -> None:
    with pytest.raises(BundleError, match="no openvino engine built there"):
        read_bundle(multistep.bundle, "openvino")
