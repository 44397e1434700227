"""Pictures inside the page: sample sheets and what differs between them, as PNG in data URIs.

In: final latents that are pictures. Out: strips of them. Never: decodes latents that are none.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tc_deploy.report.source import Source
from tc_deploy.report.words import decibels, described, pictures
from tc_deploy.search.record import FULL_POINT, PointRecord
from tc_deploy.sheet import sheet_of
from tc_deploy.types import FloatArray

MOST_IMAGES = 8
"""Of each point; more would be too small to see on a phone."""
PIXEL_CHANNELS = (1, 3)
PEAK = 2.0
"""Largest difference that two pictures in [-1, 1] can have."""
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SMALL_SIDE = 64
"""Pictures up to this many pixels are shown enlarged, with their pixels sharp."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of pictures."""

    caption: str
    uri: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The strips one below the other, the same noise in the same place."""

    strips: tuple[Strip, ...]
    amplification: int
    count: int
    sharp: bool


def needs_decoder(source: Source) -> bool:
    """Whether there are samples, and they are no pictures."""
    return any(latents.ndim != 4 or latents.shape[1] not in PIXEL_CHANNELS for latents in source.samples.values())


def sample_sheet(source: Source) -> Sheet | None:
    """The full run against the plan and the best baseline of its latency; None where there is nothing to see."""
    if needs_decoder(source):
        return None
    against = [("this plan", source.chosen), ("best baseline at comparable latency", source.best_baseline)]
    shown = [(role, point) for role, point in against if point is not None and point.name in source.samples]
    if not shown:
        return None
    full = _as_seen(source.samples[FULL_POINT])
    found = {point.name: _as_seen(source.samples[point.name]) for _, point in shown}
    factor = amplification(max(float(np.abs(images - full).max()) for images in found.values()))
    strips = [_strip("full run", (full + 1) / PEAK)]
    for role, point in shown:
        images = found[point.name]
        strips.append(_strip(_caption(role, point), (images + 1) / PEAK))
        difference = np.minimum(factor * np.abs(images - full) / PEAK, 1.0)
        strips.append(_strip(f"{role}: difference to the full run × {factor}", difference))
    return Sheet(strips=tuple(strips), amplification=factor, count=len(full), sharp=max(full.shape[2:]) <= SMALL_SIDE)


def amplification(largest: float) -> int:
    """The largest round factor at which a difference of ``largest`` is not yet clipped."""
    return max((factor for factor in AMPLIFICATIONS if factor * largest <= PEAK), default=1)


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A picture (H, W), (H, W, 3) or (H, W, 4) as a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _as_seen(latents: FloatArray) -> FloatArray:
    return np.clip(latents[:MOST_IMAGES], -1.0, 1.0)


def _caption(role: str, point: PointRecord) -> str:
    return f"{role}: {described(point)}, {decibels(point.quality.psnr_db)}"


def _strip(caption: str, values: FloatArray) -> Strip:
    """Lay pictures (n, C, H, W) with values from 0 to 1 side by side."""
    images = np.rint(255 * values).astype(np.uint8)
    row = sheet_of(images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1), columns=len(images))
    return Strip(caption=caption, uri=png_uri(row), alt=f"{pictures(len(images))}, {caption}")
