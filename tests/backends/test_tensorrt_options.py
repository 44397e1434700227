"""TensorRT's options: what each of the two takes."""

from __future__ import annotations

import pytest

from tc_deploy.backends.tensorrt.options import (
    TensorRtOptions,
    batch_axes,
    check_turing,
    checked_options,
    engine_options,
)
from tc_deploy.errors import UsageError
from tc_deploy.manifest import (
    BATCH,
    MODEL_BATCH,
    RUN_BATCH,
    Manifest,
    SolverRecord,
)
from tc_deploy.types import Precision

STEPS = 5


def manifest(*, guided: bool = True, batch_size: int | None = None, precision: Precision = Precision.FP32) -> Manifest:
    """As much of a manifest as options are checked against."""
    solver = SolverRecord(history=0, init_noise_sigma=1.0, guidance_scale=2.0 if guided else None)
    return Manifest.model_construct(batch_size=batch_size, precision=precision, graphs={}, solver=solver)


def test_a_sample_is_two_rows_with_guidance_and_one_without() -> None:
    profile = TensorRtOptions(batch_profile=(1, 2, 8))
    guided = {BATCH: (1, 2, 8), MODEL_BATCH: (2, 4, 16), RUN_BATCH: (2 * STEPS, 4 * STEPS, 16 * STEPS)}
    assert batch_axes(profile, manifest(), STEPS) == guided
    alone = {BATCH: (1, 2, 8), MODEL_BATCH: (1, 2, 8), RUN_BATCH: (STEPS, 2 * STEPS, 8 * STEPS)}
    assert batch_axes(profile, manifest(guided=False), STEPS) == alone
    assert batch_axes(TensorRtOptions(), manifest(), STEPS)[BATCH] == (1, 1, 8)


def test_a_bundle_of_a_fixed_batch_has_no_profile() -> None:
    assert batch_axes(TensorRtOptions(), manifest(batch_size=3), STEPS) == {}
    with pytest.raises(UsageError, match="exported for a batch of exactly 3; leave --batch-profile out"):
        batch_axes(TensorRtOptions(batch_profile=(1, 2, 3)), manifest(batch_size=3), STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strip_weights": True}, "needs a CUDA device while TensorRT-RTX builds"),
        ({"hardware_compatibility": "ampere-plus"}, "are TensorRT's; a TensorRT-RTX engine runs on the GPUs of"),
        ({"version_compatible": True}, "are TensorRT's; a TensorRT-RTX engine runs on the GPUs of"),
        ({"refit": "identical"}, "tensorrt-rtx: refit: unknown key; its options are "),
    ],
)
def test_what_tensorrt_rtx_cannot_do_is_refused_with_the_reason(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        checked_options("tensorrt-rtx", options, ahead_of_time=True)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensorrt_takes_them() -> None:
    def flags(**options: object) -> tuple[str, ...]:
        return checked_options("tensorrt", options, ahead_of_time=False).builder_flags(ahead_of_time=False)

    assert flags() == ()
    assert flags(version_compatible=True) == ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    assert flags(strip_weights=True) == ("REFIT_IDENTICAL", "STRIP_PLAN")
    with pytest.raises(UsageError, match="tensorrt builds for this machine's GPU; --compute-capability is for"):
        flags(compute_capability=("8.9",))


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_engines_of_tensorrt_rtx_are_built_to_be_captured(use_cuda_graph: bool) -> None:
    options = checked_options("tensorrt-rtx", {"use_cuda_graph": use_cuda_graph}, ahead_of_time=True)
    assert options.builder_flags(ahead_of_time=True) == (("REQUIRE_USER_ALLOCATION",) if use_cuda_graph else ())
    # TensorRT's are the same either way, so none is built again when the other is asked for.
    assert options.builder_flags(ahead_of_time=False) == ()
    assert ("use_cuda_graph" in engine_options(options, ahead_of_time=True)) is True
    assert ("use_cuda_graph" in engine_options(options, ahead_of_time=False)) is False


def test_turing_takes_fp16_alone() -> None:
    turing, ampere = (TensorRtOptions(compute_capability=(name,)) for name in ("7.5", "8.6"))
    for precision in Precision:
        check_turing("tensorrt-rtx", ampere, manifest(precision=precision))
    check_turing("tensorrt-rtx", turing, manifest(precision=Precision.FP16))
    for precision in (Precision.FP32, Precision.BF16):
        with pytest.raises(UsageError, match=rf"fp16 alone, and this bundle's are in {precision}; leave 7\.5 out, or"):
            check_turing("tensorrt-rtx", turing, manifest(precision=precision))


def test_a_compute_capability_is_a_number() -> None:
    expected = "compute_capability: expected numbers such as 8.6, parted by commas, found 'abc'"
    with pytest.raises(UsageError, match=expected):
        checked_options("tensorrt-rtx", {"compute_capability": ("5.0", "abc")}, ahead_of_time=True)
