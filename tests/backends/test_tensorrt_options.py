"""TensorRT's options: what each of the two takes, and batch profiles written as shapes."""

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
    GraphRecord,
    Manifest,
    Role,
    SolverRecord,
    TensorName,
    TensorRecord,
    only_tensor,
)
from tc_deploy.types import Precision


def manifest(*, guided: bool = True, batch_size: int | None = None, precision: Precision = Precision.FP32) -> Manifest:
    """As much of a manifest as options are checked against."""
    inputs = {
        "full": {
            only_tensor(Role.HIDDEN_STATES): (MODEL_BATCH, 4, 8, 8),
            only_tensor(Role.TIMESTEP): (MODEL_BATCH,),
        },
        "solver": {TensorName(name="x.1", role=Role.VALUE): (BATCH, 4)},
    }
    graphs = {
        name: GraphRecord(
            file="",
            inputs=tuple(
                TensorRecord(**dict(tensor), dtype="float32", shape=shape) for tensor, shape in tensors.items()
            ),
            outputs=(),
            max_abs_error=None,
        )
        for name, tensors in inputs.items()
    }
    solver = SolverRecord(history=0, init_noise_sigma=1.0, guidance_scale=2.0 if guided else None)
    return Manifest.model_construct(batch_size=batch_size, precision=precision, graphs=graphs, solver=solver)


def axes(*shapes: str, **facts: bool) -> dict[str, tuple[int, int, int]]:
    names = ("min_shapes", "opt_shapes", "max_shapes")
    return batch_axes(TensorRtOptions.model_validate(dict(zip(names, shapes, strict=True))), manifest(**facts))


@pytest.mark.parametrize(
    "shapes",
    [
        ("hidden_states:2x4x8x8", "hidden_states:4x4x8x8", "hidden_states:16x4x8x8"),
        ("hidden_states:[2,4,8,8]", "hidden_states:[4, 4, 8, 8]", "timestep:[16] x.1:[8,4]"),
        ("timestep:2,x.1:1x4", "hidden_states:4x4x8x8,timestep:4", "x.1:8x4"),
    ],
)
def test_shapes_are_a_profile_as_trtexec_and_polygraphy_write_them(shapes: tuple[str, ...]) -> None:
    assert axes(*shapes) == {BATCH: (1, 2, 8), MODEL_BATCH: (2, 4, 16)}
    profile = TensorRtOptions(batch_profile=(1, 2, 8))
    assert batch_axes(profile, manifest()) == axes(*shapes)


def test_without_guidance_a_sample_is_one_row() -> None:
    assert axes("timestep:1", "timestep:2", "timestep:3", guided=False)[MODEL_BATCH] == (1, 2, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("hidden_states:3x4x8x8",), r"hidden_states: expected a shape model_batchx4x8x8, two rows .*; found 3x4x8x8"),
        (("hidden_states:2x4x8",), r"expected a shape model_batchx4x8x8.*found 2x4x8$"),
        (("hidden_states:2x4x9x8",), r"found 2x4x9x8$"),
        (("timestep:0",), r"timestep: expected a shape"),
        (("latents:2",), r"no graph has an input 'latents'; the inputs are hidden_states, timestep, x\.1"),
        (("timestep:2 x.1:2x4",), r"stand for different numbers of samples: \{'timestep': 1, 'x\.1': 2\}"),
        (("timestep=2",), r"shapes 'timestep=2': expected NAME:1x4x8x8 or NAME:\[1,4,8,8\]"),
        (("timestep:2x",), r"found 'timestep:2x'"),
        (("",), r"shapes '': expected NAME"),
        (("timestep:4", "timestep:2", "timestep:8"), r"grow from min to opt to max, found batches of \(2, 1, 4\)"),
    ],
)
def test_shapes_that_no_input_has_are_refused(shapes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        axes(*(shapes if len(shapes) == 3 else shapes * 3))


def test_a_profile_is_given_once_and_whole() -> None:
    with pytest.raises(UsageError, match="go together; give all three"):
        batch_axes(TensorRtOptions(min_shapes="timestep:2"), manifest())
    shapes = dict.fromkeys(("min_shapes", "opt_shapes", "max_shapes"), "timestep:2")
    both = TensorRtOptions.model_validate({**shapes, "batch_profile": (1, 1, 1)})
    with pytest.raises(UsageError, match="say the same; give one of them"):
        batch_axes(both, manifest())
    with pytest.raises(UsageError, match="exported for a batch of exactly 3; leave --batch-profile and the shapes out"):
        batch_axes(TensorRtOptions.model_validate(shapes), manifest(batch_size=3))
    assert batch_axes(TensorRtOptions(), manifest(batch_size=3)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "identical"}, "need a CUDA device while TensorRT-RTX builds"),
        ({"strip_weights": True}, "need a CUDA device while TensorRT-RTX builds"),
        ({"hardware_compatibility": "ampere-plus"}, "are TensorRT's; a TensorRT-RTX engine runs on the GPUs of"),
        ({"version_compatible": True}, "are TensorRT's; a TensorRT-RTX engine runs on the GPUs of"),
        ({"refit": "everything"}, "tensorrt-rtx: refit: must be 'identical', found 'everything'; its options are "),
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
    assert flags(refit="identical") == ("REFIT_IDENTICAL",)
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
