"""How far a tensor lies from its reference, and whether that is far enough to fail.

In: two arrays of one shape. Out: the figures of :class:`~tc_deploy.validate.record.Metrics`, and words for what lies
outside the tolerances. Computed in float64. Never: chooses a tolerance, the package's one table has them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.quality.psnr import sample_psnrs_db
from tc_deploy.tolerances import tolerance
from tc_deploy.validate.record import Metrics

LEAST_DEVIATION = 1e-3
"""A tensor that hardly varies is measured against this instead of its standard deviation."""
_SMALL = 1e-3
"""Elements below this share of the largest say nothing by their relative error."""


def metrics_of(found: NDArray[Any], expected: NDArray[Any]) -> Metrics:
    """All figures of one tensor.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, found {found.shape}")
    reference, result = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    with np.errstate(all="ignore"):
        error = np.abs(result - reference)
        size = np.abs(reference)
        counted = (size > _SMALL * size.max()) & (size > 0)
        relative = error[counted] / size[counted] if counted.any() else np.zeros(1)
        power, noise = float(reference @ reference), float(error @ error)
        norms = math.sqrt(power) * float(np.linalg.norm(result))
        return Metrics(
            max_abs=_finite(error.max()),
            median_abs=_finite(np.median(error)),
            max_rel=_finite(relative.max()),
            median_rel=_finite(np.median(relative)),
            to_deviation=_finite(error.max() / max(float(reference.std()), LEAST_DEVIATION)),
            cosine=_finite(float(reference @ result) / norms) if norms > 0 else None,
            sqnr_db=_finite(10 * np.log10(power / noise)) if power > 0 and noise > 0 else None,
        )


def failures_of(metrics: Metrics, backend: str, precision: str) -> tuple[str, ...]:
    """What lies outside its tolerance, in words."""
    if metrics.max_abs is None or metrics.to_deviation is None:
        return ("not finite",)
    found = []
    allowed = tolerance(backend, precision, "output_max_rel")
    if metrics.to_deviation > allowed:
        found.append(f"max error {metrics.to_deviation:.1e} of the deviation, allowed {allowed:.0e}")
    # An output of nearly nothing has no signal to speak of; its largest error has been judged.
    if metrics.max_abs > allowed * LEAST_DEVIATION:
        least = tolerance(backend, precision, "output_sqnr_db")
        if metrics.sqnr_db is not None and metrics.sqnr_db < least:
            found.append(f"SQNR {metrics.sqnr_db:.1f} dB, expected {least:.0f}")
        least = tolerance(backend, precision, "output_cosine")
        if metrics.cosine is not None and metrics.cosine < least:
            found.append(f"cosine {metrics.cosine:.6f}, expected {least}")
    return tuple(found)


def is_close(found: NDArray[Any], expected: NDArray[Any], backend: str, precision: str) -> bool:
    """Whether a tensor passes."""
    return found.shape == expected.shape and not failures_of(metrics_of(found, expected), backend, precision)


def relative_l2(found: NDArray[Any], expected: NDArray[Any]) -> float | None:
    """The norm of the difference over the reference's; None where that is not finite."""
    reference = expected.astype(np.float64)
    with np.errstate(all="ignore"):
        distance = np.linalg.norm((found.astype(np.float64) - reference).ravel())
        return _finite(distance / max(float(np.linalg.norm(reference.ravel())), np.finfo(np.float64).tiny))


def psnr_db(latents: NDArray[Any], reference: NDArray[Any], *, pixels: bool) -> float | None:
    """PSNR of what is seen, mean over samples, at most 140 dB.

    Pictures are clipped to [-1, 1] and the peak is 2; of latents the peak is the reference's range.

    Args:
        latents: (B, C, H, W).
        reference: (B, C, H, W).
        pixels: whether they are pictures.

    Returns:
        In dB; None where a latent is not finite.
    """
    if not np.isfinite(latents).all():
        return None
    return float(sample_psnrs_db(latents, reference, pixels=pixels).mean())


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
