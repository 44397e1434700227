"""The pictures that the second demo model learns: Google's Noto emoji, a class for each of Unicode's nine groups.

In: npm's package ``emoji-datasource-google``, unpacked (74 MB to fetch). Its pictures are Noto's, under the Apache
License 2.0 (https://github.com/googlefonts/noto-emoji); its lists are under the MIT licence.
Out: images on white in [-1, 1] and their classes.
Never: imports tc_deploy. What stands here is the user's side of the demo.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
CLASSES = len(GROUPS)
IMAGE_SIZE = 32


def images_and_labels(package: Path, size: int = IMAGE_SIZE) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load the emoji; variants of one by skin tone are left out.

    Args:
        package: the unpacked npm package, version 16.0.0.
        size: pixels of a side; the originals have 64.

    Returns:
        ``(1906, 3, size, size)`` float32 images in [-1, 1] and their ``(1906,)`` int64 groups.
    """
    images, labels = [], []
    for entry in json.loads((package / "emoji.json").read_text()):
        if not entry["has_img_google"] or entry["category"] not in GROUPS:
            continue
        glyph = Image.open(package / "img/google/64" / entry["image"]).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", glyph.size, "white"), glyph).convert("RGB")
        images.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32))
        labels.append(GROUPS.index(entry["category"]))
    return (np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32), np.array(labels, dtype=np.int64)
