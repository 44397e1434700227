"""Comparison of samples with their reference: each figure where it can be had, None where it cannot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quality.classifiers import FEATURES, IMAGE_SHAPE, write_classifier
from tolerances import tolerance

from tc_deploy.errors import ModelError
from tc_deploy.quality.classifier import Classifier
from tc_deploy.quality.compare import compare
from tc_deploy.quality.metrics import LARGEST_PSNR_DB, frechet_distance, image_psnr_db, ssim
from tc_deploy.quality.record import Quality

DB = tolerance("torch", "fp32", "psnr_db")
ROUNDING = tolerance("torch", "fp32", "metric")


@pytest.fixture
def judge(tmp_path: Path) -> Classifier:
    return Classifier(write_classifier(tmp_path))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_pictures(judge: Classifier) -> None:
    images = draw(8, *IMAGE_SHAPE)
    labels = images.clamp(-1, 1).flatten(1)[:, :3].argmax(1).to(torch.int32)
    found = compare(images, images, labels, pixels=True, judge=judge)
    assert found.psnr_db == pytest.approx(LARGEST_PSNR_DB, abs=DB)
    assert found.psnr_db_std == 0.0
    assert found.frechet_distance == pytest.approx(0.0, abs=ROUNDING)
    assert found.class_accuracy == 1.0
    assert found.ssim is None  # the pictures are too small
    assert Quality.model_validate(json.loads(found.model_dump_json())) == found


def test_every_figure_is_its_metrics() -> None:
    reference = draw(5, 4, 12, 12)
    found = compare(reference + 0.1 * draw(5, 4, 12, 12, seed=1), reference, None, pixels=False, judge=None)
    changed = reference + 0.1 * draw(5, 4, 12, 12, seed=1)
    assert found.psnr_db == image_psnr_db(changed, reference, pixels=False)
    assert found.ssim == ssim(changed, reference, pixels=False)
    assert found.frechet_distance is None
    assert found.class_accuracy is None


def test_the_spread_over_samples() -> None:
    reference = torch.zeros(2, 1, 4, 4)
    changed = reference.clone()
    changed[0] += 0.2  # 20 dB
    changed[1] += 0.02  # 40 dB
    found = compare(changed, reference, None, pixels=True, judge=None)
    assert (found.psnr_db, found.psnr_db_std) == pytest.approx((30.0, 10.0), abs=DB)
    assert compare(changed[:1], reference[:1], None, pixels=True, judge=None).psnr_db_std == 0.0


@pytest.mark.parametrize("pixels", [True, False])
def test_the_judge_sees_pictures_as_they_are_seen_and_latents_as_they_are(judge: Classifier, pixels: bool) -> None:
    reference, images = 2 * draw(9, *IMAGE_SHAPE), 2 * draw(9, *IMAGE_SHAPE, seed=1)
    seen = [values.clamp(-1, 1) if pixels else values for values in (images, reference)]
    found = compare(images, reference, None, pixels=pixels, judge=judge)
    assert found.frechet_distance == frechet_distance(*(values.flatten(1)[:, :FEATURES] for values in seen))
    assert found.class_accuracy is None


def test_the_share_of_classes_that_are_read(judge: Classifier) -> None:
    images = torch.zeros(4, *IMAGE_SHAPE)
    images[:, 0, 0, 2] = 1.0  # all are read as class 2
    found = compare(images, images, torch.tensor([2, 0, 2, 2]), pixels=True, judge=judge)
    assert found.class_accuracy == 0.75


def test_too_few_samples_for_a_distance_leave_it_out(judge: Classifier) -> None:
    def distance(samples: int) -> float | None:
        images = draw(samples, *IMAGE_SHAPE)
        return compare(images, images, None, pixels=True, judge=judge).frechet_distance

    assert distance(FEATURES) is None
    assert distance(FEATURES + 1) is not None


def test_a_judge_that_does_not_fit_is_refused(judge: Classifier) -> None:
    images = draw(4, 3, 4, 4)
    with pytest.raises(ModelError, match=r"judge.onnx: the classifier reads images \(1, 4, 4\), the model makes \(3"):
        compare(images, images, None, pixels=True, judge=judge)
    images = draw(4, *IMAGE_SHAPE)
    with pytest.raises(ModelError, match=r"judge.onnx: the classifier knows 3 classes, found class 3 asked for; name"):
        compare(images, images, torch.tensor([0, 1, 2, 3]), pixels=True, judge=judge)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda values: values[:1], r"expected \(2, 1, 4, 4\) as the reference, found \(1, 1, 4, 4\)"),
        (lambda values: values / 0, "expected finite values"),
    ],
)
def test_samples_that_cannot_be_compared(edit: Callable[[torch.Tensor], torch.Tensor], problem: str) -> None:
    reference = draw(2, *IMAGE_SHAPE)
    with pytest.raises(ValueError, match=problem):
        compare(edit(reference), reference, None, pixels=True, judge=None)
