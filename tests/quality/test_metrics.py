"""The figures of quality: by hand, against closed forms, and where they have no answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from tolerances import tolerance

from tc_deploy.errors import UsageError
from tc_deploy.quality.metrics import (
    LARGEST_PSNR_DB,
    SSIM_WINDOW,
    drift,
    frechet_distance,
    image_psnr_db,
    sample_psnrs_db,
    ssim,
)

DB = tolerance("torch", "fp32", "psnr_db")
ROUNDING = tolerance("torch", "fp32", "metric")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31)
kinds = pytest.mark.parametrize("pixels", [True, False], ids=["pictures", "latents"])

# ----------------------------------------------------------------------------------------------------------------- PSNR


def test_psnr_of_latents_by_hand() -> None:
    expected = torch.zeros(2, 1, 2, 2)
    expected[0, 0, 0, 0] = 2.0  # the range, over all samples, is 2
    found = expected.clone()
    found[0] += 0.2  # 20 dB
    found[1] -= 0.02  # 40 dB
    assert sample_psnrs_db(found, expected, pixels=False).tolist() == pytest.approx([20.0, 40.0], abs=DB)
    assert image_psnr_db(found, expected, pixels=False) == pytest.approx(30.0, abs=DB)
    # Ten times as large, with the same relative error.
    assert image_psnr_db(10 * found, 10 * expected, pixels=False) == pytest.approx(30.0, abs=DB)


@kinds
def test_equal_pictures_have_a_finite_psnr(pixels: bool) -> None:
    images = draw(2, 3, 4, 4)
    assert image_psnr_db(images, images, pixels=pixels) == pytest.approx(LARGEST_PSNR_DB, abs=DB)


def test_pictures_are_compared_as_they_are_seen() -> None:
    expected = torch.linspace(-3, 3, 32).reshape(1, 2, 4, 4)
    found = torch.where(expected.abs() > 1, expected * 2, expected)
    assert image_psnr_db(found, expected, pixels=True) == pytest.approx(LARGEST_PSNR_DB, abs=DB)
    assert image_psnr_db(found, expected, pixels=False) < 20
    shifted = expected.clamp(-1, 1) * 0.9
    by_hand = -10 * np.log10(float(((shifted - expected.clamp(-1, 1)) ** 2).mean()) / 4)
    assert image_psnr_db(shifted, expected, pixels=True) == pytest.approx(by_hand, abs=DB)


# ----------------------------------------------------------------------------------------------------------------- SSIM


def ssim_by_definition(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Wang et al. 2004, equation 13, of one channel of values in 0..1; edges by reflection."""
    reach = SSIM_WINDOW // 2
    offsets = np.arange(-reach, reach + 1)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def local_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        padded = np.pad(values, reach, mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(padded, window.shape)
        return np.einsum("hwij,ij->hw", views, window)

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = local_mean(found), local_mean(expected)
    variance_x, variance_y = local_mean(found**2) - mean_x**2, local_mean(expected**2) - mean_y**2
    covariance = local_mean(found * expected) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float((above / below).mean())


def test_ssim_of_pictures_by_definition() -> None:
    expected, noise = draw(2, 1, 16, 13).clamp(-1, 1), draw(2, 1, 16, 13, seed=1)
    found = (expected + 0.3 * noise).clamp(-1, 1)
    by_hand = [
        ssim_by_definition((x[0].double().numpy() + 1) / 2, (y[0].double().numpy() + 1) / 2)
        for x, y in zip(found, expected, strict=True)
    ]
    assert ssim(found, expected, pixels=True) == pytest.approx(np.mean(by_hand), abs=ROUNDING)
    assert 0 < by_hand[0] < 0.99


def test_ssim_of_latents_takes_each_channels_range_from_the_reference() -> None:
    expected = draw(2, 4, 12, 12)
    found = expected + 0.3 * draw(2, 4, 12, 12, seed=1)
    by_hand = []
    for channel in range(4):
        lowest, highest = expected[:, channel].min(), expected[:, channel].max()
        pair = (((values[:, channel] - lowest) / (highest - lowest)).double().numpy() for values in (found, expected))
        by_hand += [ssim_by_definition(x, y) for x, y in zip(*pair, strict=True)]
    whole = ssim(found, expected, pixels=False)
    assert whole == pytest.approx(np.mean(by_hand), abs=ROUNDING)
    # A channel may have any scale and offset of its own.
    scale, offset = (torch.tensor(values)[:, None, None] for values in ([1.0, 9.0, 0.1, 3.0], [0.0, -5.0, 2.0, 40.0]))
    assert ssim(found * scale + offset, expected * scale + offset, pixels=False) == pytest.approx(whole, abs=ROUNDING)


def test_ssim_of_a_constant_channel() -> None:
    flat = torch.zeros(1, 4, 12, 12)
    assert ssim(flat, flat, pixels=False) == pytest.approx(1.0, abs=ROUNDING)
    assert ssim(flat + draw(1, 4, 12, 12), flat, pixels=False) == pytest.approx(0.0, abs=ROUNDING)


@kinds
def test_frames_of_video_count_as_pictures(pixels: bool) -> None:
    expected = draw(2, 3, 4, 12, 13)
    found = expected + 0.3 * draw(2, 3, 4, 12, 13, seed=1)
    frames = [torch.cat([values[:, :, frame] for frame in range(4)]) for values in (found, expected)]
    assert ssim(found, expected, pixels=pixels) == pytest.approx(ssim(*frames, pixels=pixels), abs=ROUNDING)


def test_packed_latents_have_no_ssim_but_a_psnr() -> None:
    expected = draw(2, 24, 16)
    found = expected + 0.1 * draw(2, 24, 16, seed=1)
    assert ssim(found, expected, pixels=False) is None
    folded = (values.reshape(2, 16, 4, 6) for values in (found, expected))
    assert image_psnr_db(found, expected, pixels=False) == pytest.approx(image_psnr_db(*folded, pixels=False))


@kinds
@given(seed=seeds, strength=st.floats(0.0, 3.0))
def test_ssim_is_at_most_1_which_equal_pictures_have(seed: int, strength: float, pixels: bool) -> None:
    expected, noise = draw(2, 3, 11, 12, seed=seed), draw(2, 3, 11, 12, seed=seed + 1)
    assert ssim(expected, expected, pixels=pixels) == pytest.approx(1.0, abs=ROUNDING)
    found = ssim(expected + strength * noise, expected, pixels=pixels)
    assert found is not None
    assert -1.0 <= found <= 1.0 + ROUNDING
    if strength > 0.1:
        assert found < 0.999


@given(seed=seeds)
def test_ssim_of_pictures_is_symmetric(seed: int) -> None:
    first, second = draw(2, 1, 16, 16, seed=seed), draw(2, 1, 16, 16, seed=seed + 1)
    assert ssim(first, second, pixels=True) == pytest.approx(ssim(second, first, pixels=True), abs=ROUNDING)


@kinds
def test_there_is_no_ssim_where_the_window_does_not_fit(pixels: bool) -> None:
    assert ssim(*draw(2, 1, 3, SSIM_WINDOW, SSIM_WINDOW), pixels=pixels) is not None
    assert ssim(*draw(2, 1, 3, SSIM_WINDOW, SSIM_WINDOW - 1), pixels=pixels) is None
    assert ssim(*draw(2, 1, 3, SSIM_WINDOW - 1, SSIM_WINDOW), pixels=pixels) is None


# ---------------------------------------------------------------------------------------------------------------- drift


def test_drift_by_hand() -> None:
    reference = draw(3, 2, 4, 8, 8)
    assert drift(reference, reference) == (0.0, 0.0, 0.0)
    found = reference.clone()
    found[1, 0] *= 1.5  # half of its own length, in one of two samples
    found[2] *= -1
    assert drift(found, reference) == pytest.approx((0.0, 0.25, 2.0), abs=ROUNDING)


# ---------------------------------------------------------------------------------------------------- Fréchet distance


def features_with(mean: NDArray[np.float64], covariance: NDArray[np.float64], samples: int) -> torch.Tensor:
    """(samples, F) whose mean and covariance are exactly the given ones."""
    drawn = np.random.default_rng(0).standard_normal((samples, len(mean)))
    drawn -= drawn.mean(0)
    whitened = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    first = features_with(np.array([1.0, 0.0, -2.0]), np.diag([1.0, 4.0, 9.0]), 10)
    second = features_with(np.array([0.0, 0.0, 0.0]), np.diag([4.0, 4.0, 1.0]), 25)
    # |mean difference|^2 + sum of (difference of standard deviations)^2
    assert frechet_distance(first, second) == pytest.approx(5.0 + (1.0 + 0.0 + 4.0), abs=ROUNDING)


@given(seed=seeds, width=st.integers(2, 6))
def test_frechet_distance_as_scipy_has_it(seed: int, width: int) -> None:
    first, second = draw(width + 30, width, seed=seed), draw(width + 20, width, seed=seed + 1) * 2 + 1
    x, y = first.double().numpy(), second.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    crossed = np.trace(sqrtm(cov_x @ cov_y)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * crossed
    assert frechet_distance(first, second) == pytest.approx(expected, abs=ROUNDING)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=ROUNDING)


@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_equal_features_have_no_distance(seed: int, scale: float) -> None:
    features = draw(40, 8, seed=seed) * scale
    shuffled = features[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    distance = frechet_distance(features, shuffled)
    assert 0.0 <= distance <= ROUNDING * scale**2
    assert frechet_distance(features + scale, shuffled) == pytest.approx(8 * scale**2, rel=ROUNDING)


@pytest.mark.parametrize(("mine", "theirs"), [(4, 40), (40, 4)])
def test_a_frechet_distance_of_too_few_samples_is_refused(mine: int, theirs: int) -> None:
    with pytest.raises(UsageError, match=r"distance of 4 features needs 5 samples or more, found 4; take more samples"):
        frechet_distance(draw(mine, 4), draw(theirs, 4))
    assert math.isfinite(frechet_distance(draw(5, 4), draw(5, 4, seed=1)))
