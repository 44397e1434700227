"""What is in a picture of the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PREFIX = "data:image/png;base64,"


def pixels_of(uri: str) -> NDArray[np.uint8]:
    assert uri.startswith(PREFIX)
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(PREFIX)))) as image:
        return np.asarray(image)
