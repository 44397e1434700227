"""Drift: the same sampling run several ways, and how much of the difference is whose.

Neighbours in the chain *full in PyTorch, cached in PyTorch, ONNX Runtime, the engine kind at the graphs' own precision,
the target* differ by one cause each: the method, the export, the engine, the precision. In: their latents. Out: one
column per cause, and in words where a column first exceeds its share. Never: runs anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tc_deploy.tolerances import tolerance
from tc_deploy.types import FloatArray
from tc_deploy.validate.metrics import psnr_db, relative_l2
from tc_deploy.validate.record import DriftRecord

Column: TypeAlias = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Latents after each step, (T, B, C, H, W); None where a run could not be made or would be its neighbour again."""

    full: FloatArray
    """PyTorch, every step full."""
    exact: FloatArray
    """PyTorch in fp32, under the plan."""
    cached: FloatArray
    """The same with products in the graphs' precision."""
    onnxruntime: FloatArray | None
    own_precision: FloatArray | None
    """The target's engine kind at the graphs' own precision."""
    target: FloatArray


@dataclass(frozen=True, kw_only=True)
class Excess:
    """Where a column first exceeds its share."""

    cause: str
    step: int
    value: float | None
    """None where the latents are not finite."""
    share: float

    def __str__(self) -> str:
        value = "is not finite" if self.value is None else f"is {self.value:.1e}"
        return f"{self.cause} error {value} from step {self.step} on, its share is {self.share:.0e}"


def drift_of(runs: Runs, *, pixels: bool) -> DriftRecord:
    """The columns; ``exceeded`` is left empty."""
    return DriftRecord(
        algorithm=_column(runs.exact, runs.full),
        export=None if runs.onnxruntime is None else _column(runs.onnxruntime, runs.cached),
        engine=_engine_column(runs),
        precision=_precision_column(runs),
        total=_column(runs.target, runs.exact),
        image_psnr_db=psnr_db(runs.target[-1], runs.exact[-1], pixels=pixels),
        image_psnr_to_full_db=psnr_db(runs.target[-1], runs.full[-1], pixels=pixels),
        exceeded=(),
    )


def excesses(drift: DriftRecord, backend: str, own_precision: str, precision: str) -> tuple[Excess, ...]:
    """Where each column first exceeds its share; the method's error is the plan's business and has none.

    Args:
        drift: the columns.
        backend: the target's engine kind.
        own_precision: the graphs'.
        precision: what the target computes in.
    """
    shares = {
        "export": (drift.export, tolerance("onnxruntime", own_precision, "drift_rel_l2")),
        "engine": (drift.engine, tolerance(backend, own_precision, "drift_rel_l2")),
        "precision": (drift.precision, tolerance(backend, precision, "drift_rel_l2")),
    }
    if all(column is None for column, _ in shares.values()):
        shares["total"] = (drift.total, tolerance(backend, precision, "drift_rel_l2"))
    found = []
    for cause, (column, share) in shares.items():
        for step, value in enumerate(column or ()):
            if value is None or value > share:
                found.append(Excess(cause=cause, step=step, value=value, share=share))
                break
    return tuple(found)


def image_failures(drift: DriftRecord, backend: str, precision: str) -> tuple[str, ...]:
    """In words, a final picture that is too far from PyTorch's."""
    least = tolerance(backend, precision, "image_psnr_db")
    found = drift.image_psnr_db
    if found is not None and found >= least:
        return ()
    text = "not finite" if found is None else f"at {found:.1f} dB to PyTorch's"
    return (f"the final picture is {text}, expected {least:.0f} dB",)


def _engine_column(runs: Runs) -> Column | None:
    found = runs.target if runs.own_precision is None else runs.own_precision
    if runs.onnxruntime is None or found is runs.onnxruntime:
        return None
    return _column(found, runs.onnxruntime)


def _precision_column(runs: Runs) -> Column | None:
    """What half precision costs: the engine's where it computes in another than its graphs, else the graphs'."""
    if runs.own_precision is not None:
        return _column(runs.target, runs.own_precision)
    return None if np.array_equal(runs.cached, runs.exact) else _column(runs.cached, runs.exact)


def _column(found: Sequence[FloatArray] | FloatArray, expected: Sequence[FloatArray] | FloatArray) -> Column:
    return tuple(relative_l2(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
