"""Handwritten digits for the demo: the images a demo model learns, and the reader that judges its samples.

In: scikit-learn's ``load_digits`` (1797 real 8 x 8 scans, shipped inside scikit-learn, no download).
Out: images upsampled to 16 x 16 (or another size) in [-1, 1], and the share of samples that a classifier reads as the
class asked for.
Never: imports tc_deploy. What stands here is the user's side of the demo.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

IMAGE_SIZE = 16
CLASSES = 10


def images_and_labels(size: int = IMAGE_SIZE) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load the digits.

    Args:
        size: pixels of a side.

    Returns:
        ``(1797, 1, size, size)`` float32 images in [-1, 1] and their ``(1797,)`` int64 labels.
    """
    digits = load_digits()
    scans = [
        Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for scan in digits.images
    ]
    images = np.stack([np.asarray(scan) for scan in scans])[:, None]
    return (images / 8 - 1).clip(-1, 1).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=1)
def _reader(size: int) -> Any:
    images, labels = images_and_labels(size)
    # The kernel is a distance summed over pixels, so its width goes with their number.
    return SVC(gamma=0.01 * (IMAGE_SIZE / size) ** 2, C=10).fit(images.reshape(len(images), -1), labels)


def class_accuracy(images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of ``images`` that a support vector classifier, fitted on the real digits, reads as ``labels``.

    Args:
        images: ``(B, 1, size, size)`` in [-1, 1].
        labels: ``(B,)`` classes asked for.
    """
    return float((_reader(images.shape[-1]).predict(images.clip(-1, 1).reshape(len(images), -1)) == labels).mean())
