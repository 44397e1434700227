"""All figures of a comparison in one record, which is read without PyTorch."""

from __future__ import annotations

from tc_deploy.bundle import Document


class Quality(Document):
    """How far pictures are from their reference; None where a figure cannot be had."""

    psnr_db: float
    """Mean over samples, as :func:`tc_deploy.quality.metrics.image_psnr_db`."""
    psnr_db_std: float
    """Standard deviation over samples, of these samples alone (divided by B): 0 for a single one."""
    ssim: float | None
    """None where the pictures are smaller than SSIM's window."""
    frechet_distance: float | None
    """Of the classifier's features, to those of the reference. None without a classifier, or with no more samples than
    it has features. Its bias depends on the sample count, so compare it at equal counts only."""
    class_accuracy: float | None
    """Share that the classifier reads as the class asked for. None without a classifier or without classes."""
