"""Pictures as bytes. In: finite values in [-1, 1]. Out: what an image file holds. Never: asks where they are from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tc_deploy.types import FloatArray


def images_from_pixels(pixels: FloatArray) -> NDArray[np.uint8]:
    """Pictures in [-1, 1] as bytes; what lies outside is cut off.

    Args:
        pixels: (n, 1, H, W) or (n, 3, H, W), of video (n, 3, F, H, W).

    Returns:
        (n, H, W) or (n, H, W, 3), of video (n, F, H, W, 3).
    """
    images = ((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)
