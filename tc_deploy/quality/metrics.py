"""The figures of quality, each a pure function of tensors.

In: pictures or latents with their reference, features, trajectories. Out: floats. Never: loads a model, or downloads
weights, as the usual LPIPS and Inception features would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tc_deploy import tolerances
from tc_deploy.errors import UsageError
from tc_deploy.quality import psnr

LARGEST_PSNR_DB = tolerances.LARGEST_PSNR_DB
SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window (sigma 1.5) that SSIM was published with, and that torchmetrics makes of it."""


def as_seen(latents: Tensor, *, pixels: bool) -> Tensor:
    """Pictures as a viewer has them, clipped to [-1, 1]; latents that are no pictures stay as they are."""
    return latents.clamp(-1, 1) if pixels else latents


def sample_psnrs_db(latents: Tensor, reference: Tensor, *, pixels: bool) -> Tensor:
    """:func:`tc_deploy.quality.psnr.sample_psnrs_db` of tensors: (B,) in dB."""
    arrays = (values.detach().cpu().numpy() for values in (latents, reference))
    return torch.from_numpy(psnr.sample_psnrs_db(*arrays, pixels=pixels)).float()


def image_psnr_db(latents: Tensor, reference: Tensor, *, pixels: bool) -> float:
    """PSNR of what is seen: the mean over samples of :func:`sample_psnrs_db`."""
    return float(sample_psnrs_db(latents, reference, pixels=pixels).mean())


def ssim(latents: Tensor, reference: Tensor, *, pixels: bool) -> float | None:
    """Structural similarity (Wang et al. 2004), mean over samples, frames, channels and pixels.

    SSIM is defined for values from 0 up: pictures are clipped to [-1, 1] and shifted to 0..2, which gives the figure
    that they have as 8-bit files, but for rounding. Of latents that are no pictures each channel is shifted and scaled
    by its own range in ``reference``. At an edge the picture is continued by reflection.

    Args:
        latents: (B, C, H, W), or (B, C, F, H, W) of video, whose frames count as pictures.
        reference: of the same shape.
        pixels: whether they are pictures.

    Returns:
        At most 1, for equal pictures. None where a side is shorter than the window of 11 pixels: a smaller window would
        give another figure under the same name. At 16 pixels the window sees half of the picture's side, so there
        SSIM says little about where in the picture a difference lies. None too where latents come packed, without
        height and width.
    """
    if reference.ndim < 4 or min(reference.shape[-2:]) < SSIM_WINDOW:
        return None
    if reference.ndim == 5:
        latents, reference = (values.transpose(1, 2).flatten(0, 1) for values in (latents, reference))
    from torchmetrics.functional.image import structural_similarity_index_measure

    found, expected = as_seen(latents, pixels=pixels).double(), as_seen(reference, pixels=pixels).double()
    if pixels:
        lowest, span = expected.new_tensor(-1.0), expected.new_tensor(2.0)
    else:
        lowest = expected.amin((0, 2, 3), keepdim=True)
        span = expected.amax((0, 2, 3), keepdim=True) - lowest
    # A channel that is constant has no range; any difference to it is then as large as can be.
    span = span.clamp_min(torch.finfo(torch.float32).tiny)
    found, expected = ((values - lowest) / span for values in (found, expected))
    similarity = structural_similarity_index_measure(found, expected, sigma=1.5, data_range=1.0)
    assert isinstance(similarity, Tensor)  # a second picture is returned on demand only
    return float(similarity)


def drift(trajectory: Tensor, reference: Tensor) -> tuple[float, ...]:
    """How far a trajectory has left its reference after each step.

    Args:
        trajectory: (T, B, ...) latents after each step.
        reference: (T, B, ...) the same of the reference.

    Returns:
        T numbers: L2 norm of the difference over that of the reference, mean over samples.
    """
    distances = (trajectory - reference).flatten(2).norm(dim=2)
    return tuple((distances / reference.flatten(2).norm(dim=2)).mean(1).tolist())


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between the Gaussians of two sets of features, as FID has it (Heusel et al. 2017).

    Args:
        features: (B, F).
        reference: (R, F); not sample by sample the same pictures, nor as many.

    Raises:
        UsageError: a set has fewer than F + 1 samples, so that its covariance says nothing about some directions.
    """
    width, samples = features.shape[1], min(len(features), len(reference))
    if samples <= width:
        raise UsageError(
            f"the Fréchet distance of {width} features needs {width + 1} samples or more, found {samples}; take more"
            " samples or a classifier with fewer features"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(width))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    # Rounding may leave a distance of equal sets a little below 0.
    return max(0.0, float(metric.compute()))
