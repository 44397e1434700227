"""What a TensorRT target can be built with, checked against the bundle and against what each of the two can do.

In: options by name, as the command line or a target's manifest gives them. Out: :class:`TensorRtOptions`, the sizes of
the open batch axes, and the builder's flags. Never: imports TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator

from tc_deploy.bundle import Document, first_problem
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BATCH, FP32_GRAPHS, MODEL_BATCH, RUN_BATCH, Manifest
from tc_deploy.types import Precision

DEFAULT_BATCH_PROFILE = (1, 1, 8)
"""For a bundle of any batch size."""
TURING = "7.5"


class TensorRtOptions(Document):
    """What a target can be built with."""

    compute_capability: tuple[str, ...] = ()
    """TensorRT-RTX: the GPUs to build for; none means Ampere and later."""
    batch_profile: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Least, best and largest number of samples, for a bundle of any batch size."""
    workspace_mib: PositiveInt | None = None
    """Limit of an engine's scratch memory; none leaves it at the GPU's memory."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    """0 builds fastest, 5 searches longest; none leaves it to the builder."""
    hardware_compatibility: Literal["ampere-plus", "same-compute-capability"] | None = None
    """TensorRT: other GPUs that the engine must run on; none means this one."""
    version_compatible: bool = False
    """TensorRT: later versions of it may load the engine, which brings no host code of its own for that."""
    strip_weights: bool = False
    """TensorRT: the engine holds no weights; they are taken from the bundle when it is loaded."""
    use_cuda_graph: bool = True
    """Runs are captured as CUDA graphs and replayed. A TensorRT-RTX engine is built for it; and whatever loads a target
    runs it as it was built, so no command needs a switch of its own."""

    @field_validator("compute_capability")
    @classmethod
    def _check_capabilities(cls, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        for capability in capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise ValueError(f"expected numbers such as 8.6, parted by commas, found {capability!r}")
        return capabilities

    @field_validator("batch_profile")
    @classmethod
    def _check_order(cls, profile: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if profile is not None and list(profile) != sorted(profile):
            raise ValueError("expected the least, the best and the largest number of samples, in this order")
        return profile

    def builder_flags(self, *, ahead_of_time: bool) -> tuple[str, ...]:
        """Members of the ``BuilderFlag`` of TensorRT, or (``ahead_of_time``) of TensorRT-RTX."""
        flags = []
        if ahead_of_time and self.use_cuda_graph:
            # Otherwise an engine may allocate while it runs, which no capture allows.
            flags.append("REQUIRE_USER_ALLOCATION")
        if self.version_compatible:
            # The lean runtime that a plan would bring is host code, which the loader does not allow.
            flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
        if self.strip_weights:
            flags += ["REFIT_IDENTICAL", "STRIP_PLAN"]
        return tuple(flags)


def checked_options(backend: str, options: Mapping[str, Any], *, ahead_of_time: bool) -> TensorRtOptions:
    """Options of one of the two, TensorRT or (``ahead_of_time``) TensorRT-RTX.

    Raises:
        UsageError: an option is unknown or out of range, or only the other one has it.
    """
    try:
        chosen = TensorRtOptions.model_validate(options)
    except ValidationError as error:
        where, reason = first_problem(error)
        known = ", ".join(TensorRtOptions.model_fields)
        raise UsageError(f"{backend}: {where}: {reason}; its options are {known}") from None
    if not ahead_of_time:
        if chosen.compute_capability:
            raise UsageError(f"{backend} builds for this machine's GPU; --compute-capability is for tensorrt-rtx")
        return chosen
    if chosen.strip_weights:
        raise UsageError(
            f"{backend}: --strip-weights needs a CUDA device while TensorRT-RTX builds, and it is made to build without"
            " one here; leave it out, or build with --backend tensorrt"
        )
    if chosen.hardware_compatibility or chosen.version_compatible:
        raise UsageError(
            f"{backend}: --hardware-compatibility and --version-compatible are TensorRT's; a TensorRT-RTX engine runs"
            " on the GPUs of --compute-capability and with the version that built it; leave them out"
        )
    return chosen


def engine_options(options: TensorRtOptions, *, ahead_of_time: bool) -> dict[str, Any]:
    """The options that make engines differ; those of TensorRT are the same whether runs are captured or not."""
    # Engines of before had TF32 in fp32's place, and are built again.
    return options.model_dump(mode="json", exclude=None if ahead_of_time else {"use_cuda_graph"}) | {"tf32": False}


def check_turing(backend: str, options: TensorRtOptions, manifest: Manifest) -> None:
    """Check that a bundle has a precision that the oldest of the GPUs can multiply in.

    Raises:
        UsageError: it has not.
    """
    if TURING in options.compute_capability and manifest.precision is not Precision.FP16:
        raise UsageError(
            f"{backend}: compute capability {TURING} (Turing) takes matrix products in fp16 alone, and this bundle's"
            f" are in {manifest.precision}; leave {TURING} out, or export a bundle for it with --precision fp16"
        )
    kept = [name for name in FP32_GRAPHS if name in manifest.graphs]
    if TURING in options.compute_capability and kept:
        raise UsageError(
            f"{backend}: compute capability {TURING} (Turing) takes matrix products in fp16 alone, and this bundle's"
            f" {kept[0]} is in fp32; leave {TURING} out, or export without --with-decoder and --with-text-encoder"
        )


def batch_axes(options: TensorRtOptions, manifest: Manifest, steps: int) -> dict[str, tuple[int, int, int]]:
    """The least, best and largest size of the open batch axes; empty where a bundle has none.

    Args:
        options: which batches are wanted.
        manifest: the bundle's.
        steps: of a run; what is computed for all of them at once has as many times the rows.

    Raises:
        UsageError: a profile is given for a bundle of a fixed batch.
    """
    if manifest.batch_size is not None:
        if options.batch_profile is not None:
            raise UsageError(
                f"this bundle was exported for a batch of exactly {manifest.batch_size}; leave --batch-profile out"
            )
        return {}
    least, best, largest = options.batch_profile or DEFAULT_BATCH_PROFILE
    sizes = [manifest.batch_axes(samples, steps) for samples in (least, best, largest)]
    return {axis: (sizes[0][axis], sizes[1][axis], sizes[2][axis]) for axis in (BATCH, MODEL_BATCH, RUN_BATCH)}
