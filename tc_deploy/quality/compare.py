"""Pictures against their reference: every figure of quality that can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from tc_deploy.errors import ModelError
from tc_deploy.quality.classifier import Classifier
from tc_deploy.quality.metrics import as_seen, frechet_distance, sample_psnrs_db, ssim
from tc_deploy.quality.record import Quality


def compare(
    latents: Tensor, reference: Tensor, labels: Tensor | None, *, pixels: bool, judge: Classifier | None
) -> Quality:
    """Compare samples with their reference.

    Args:
        latents: (B, ...) finite; pictures or latents.
        reference: (B, ...) finite, from the same noise: the model's own full run.
        labels: (B,) the class that was asked for; None where there are no classes.
        pixels: whether they are pictures, which are compared as they are seen, clipped to [-1, 1].
        judge: gives the features and reads the classes.

    Raises:
        ModelError: the classifier reads other pictures, or knows fewer classes than were asked for.
        ValueError: the shapes differ, or a value is not finite.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"expected {tuple(reference.shape)} as the reference, found {tuple(latents.shape)}")
    if not (latents.isfinite().all() and reference.isfinite().all()):
        raise ValueError("expected finite values")
    psnrs_db = sample_psnrs_db(latents, reference, pixels=pixels)
    distance = accuracy = None
    if judge is not None:
        judge.check_fits(tuple(latents.shape[1:]))
        features, logits = judge(as_seen(latents, pixels=pixels))
        if len(features) > judge.features:
            distance = frechet_distance(features, judge(as_seen(reference, pixels=pixels))[0])
        if labels is not None:
            accuracy = _class_accuracy(logits, labels, judge)
    return Quality(
        psnr_db=float(psnrs_db.mean()),
        psnr_db_std=float(psnrs_db.std(correction=0)),
        ssim=ssim(latents, reference, pixels=pixels),
        frechet_distance=distance,
        class_accuracy=accuracy,
    )


def _class_accuracy(logits: Tensor, labels: Tensor, judge: Classifier) -> float:
    if int(labels.max()) >= judge.classes:
        raise ModelError(
            f"{judge.path}: the classifier knows {judge.classes} classes, found class {int(labels.max())} asked for;"
            " name a classifier of the model's classes"
        )
    return float((logits.argmax(1) == labels).to(torch.float64).mean())
