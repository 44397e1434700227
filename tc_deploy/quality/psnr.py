"""Peak signal-to-noise ratio: the one definition, of arrays, for those with PyTorch and those without.

In: pictures or latents with their reference. Out: decibels. Never: imports torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.tolerances import LARGEST_PSNR_DB


def sample_psnrs_db(latents: NDArray[Any], reference: NDArray[Any], *, pixels: bool) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each sample.

    Samples that agree better than fp32 can tell count as 140 dB, so that equal pictures have a finite figure.

    Args:
        latents: (B, ...).
        reference: (B, ...).
        pixels: whether they are pictures: these are clipped to [-1, 1], and the peak is 2. Of latents that are none the
            peak is the range that ``reference`` has over all samples.

    Returns:
        (B,) in dB.
    """
    found, expected = (array.astype(np.float64) for array in (latents, reference))
    if pixels:
        found, expected = found.clip(-1, 1), expected.clip(-1, 1)
    peak = 2.0 if pixels else float(expected.max() - expected.min()) or 1.0
    errors = (((found - expected) / peak) ** 2).reshape(len(found), -1).mean(axis=1)
    decibels: NDArray[np.float64] = -10 * np.log10(np.maximum(errors, 10 ** (-LARGEST_PSNR_DB / 10)))
    return decibels
