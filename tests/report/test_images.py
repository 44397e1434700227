"""Sample sheets: the pictures that were made, and their differences at the factor that is printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.folders import CHOSEN, UNIFORM, make_samples, points_of_the_demo, write_search
from report.png import pixels_of

from tc_deploy.report.images import MOST_IMAGES, PEAK, amplification, needs_decoder, sample_sheet
from tc_deploy.report.source import source_from_folder
from tc_deploy.search.record import FULL_POINT
from tc_deploy.sheet import GAP, GREY
from tc_deploy.types import FloatArray


def tiles(uri: str, channels: int) -> FloatArray:
    """(n, C, H, W) from 0 to 255."""
    row = pixels_of(uri).astype(np.float32)
    side = row.shape[0]
    row = np.concatenate([row, np.full((side, GAP, *row.shape[2:]), GREY, np.float32)], axis=1)
    return row.reshape(side, -1, side + GAP, channels)[:, :, :side].transpose(1, 3, 0, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_and_their_differences(tmp_path: Path, channels: int) -> None:
    samples = make_samples(points_of_the_demo(), channels, count=MOST_IMAGES + 2)
    source = source_from_folder(write_search(tmp_path / "plan", samples=samples))
    sheet = sample_sheet(source)
    assert sheet is not None
    assert (sheet.count, sheet.sharp) == (MOST_IMAGES, True)
    assert not needs_decoder(source)
    seen = {name: np.clip(latents[:MOST_IMAGES], -1, 1) for name, latents in samples.items()}
    full = seen[FULL_POINT]
    expected = [full]
    for name in (CHOSEN, UNIFORM):
        expected += [seen[name], PEAK * sheet.amplification * np.abs(seen[name] - full) / PEAK - 1]
    for strip, values in zip(sheet.strips, expected, strict=True):
        assert np.abs(tiles(strip.uri, channels) - 255 * (values + 1) / 2).max() <= 0.51
        assert strip.alt.startswith("8 pictures, ")
    brightest = max(pixels_of(strip.uri).max() for strip in sheet.strips if "difference" in strip.caption)
    assert 255 * 0.3 < brightest <= 255
    assert f"× {sheet.amplification}" in sheet.strips[2].caption


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 2, 16, 16), (3, 64)], ids=["image", "video", "packed"])
def test_latents_that_are_no_pictures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    samples = {name: np.zeros((2, *shape), np.float32) for name in make_samples(points_of_the_demo())}
    source = source_from_folder(write_search(tmp_path / "plan", samples=samples))
    assert needs_decoder(source)
    assert sample_sheet(source) is None


def test_nothing_to_compare(tmp_path: Path) -> None:
    full = {FULL_POINT: make_samples(points_of_the_demo())[FULL_POINT]}
    source = source_from_folder(write_search(tmp_path / "plan", samples=full))
    assert sample_sheet(source) is None
    assert not needs_decoder(source)


@given(largest=st.floats(0, PEAK))
def test_no_difference_is_clipped(largest: float) -> None:
    factor = amplification(largest)
    assert factor * largest <= PEAK
    assert factor >= 1
