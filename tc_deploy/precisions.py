"""What a precision means to whoever exports, checks, validates or runs in it: one record for each.

A new one is a member of :class:`tc_deploy.types.Precision`, a record here and its lines in ``tolerances.py``. Never:
imports a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tc_deploy.types import Precision


@dataclass(frozen=True, kw_only=True)
class PrecisionRecord:
    """One precision."""

    element_type: str
    """As PyTorch and numpy call it."""
    openvino: str
    """As OpenVINO's option calls it."""
    opset: int
    """The lowest of ONNX that knows every operator for the type: Conv takes bf16 from 22 on."""
    whole_model: bool
    """Every layer is in it, and not those of the blocks alone."""
    checked_by: str
    """The engine that compares a graph with PyTorch after export: ONNX Runtime has no bf16 on a CPU."""
    leaves_samples: bool
    """Polygraphy's files, by which engines are validated, have the type."""


PRECISIONS: Final[Mapping[Precision, PrecisionRecord]] = {
    Precision.FP32: PrecisionRecord(
        element_type="float32",
        openvino="f32",
        opset=20,
        whole_model=True,
        checked_by="onnxruntime",
        leaves_samples=True,
    ),
    Precision.FP16: PrecisionRecord(
        element_type="float16",
        openvino="f16",
        opset=20,
        # Turing has no fp32 matrix product.
        whole_model=True,
        checked_by="onnxruntime",
        leaves_samples=True,
    ),
    Precision.BF16: PrecisionRecord(
        element_type="bfloat16",
        openvino="bf16",
        opset=22,
        # Latents rounded to 8 bits at the entry and the head show in the picture.
        whole_model=False,
        checked_by="openvino",
        leaves_samples=False,
    ),
}


def precision_named(name: str) -> str:
    """A precision by the name that graphs have for theirs, given that or OpenVINO's."""
    return next((precision.value for precision, record in PRECISIONS.items() if record.openvino == name), name)
