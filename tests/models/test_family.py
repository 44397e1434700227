"""A loaded model as the method sees it: its inputs, its conditions, the unconditional half."""

import dataclasses

import pytest
import torch

from tc_deploy.models.family import DiffusionTransformer


@torch.no_grad()
def test_narrow_labels_are_widened_for_the_embedding(tiny_dit: DiffusionTransformer) -> None:
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([10.0, 500.0]),
        "class_labels": torch.tensor([3, 10], dtype=torch.int32),
    }
    output = tiny_dit.forward(inputs)
    assert output.shape == (2, tiny_dit.geometry.output_channels, 8, 8)
    assert torch.equal(output, tiny_dit.forward(inputs | {"class_labels": inputs["class_labels"].long()}))


def test_random_conditions_cover_the_classes_and_never_mean_no_class(tiny_dit: DiffusionTransformer) -> None:
    labels = tiny_dit.random_conditions(500, torch.Generator().manual_seed(0))["class_labels"]
    assert labels.dtype == torch.int32
    assert labels.unique().tolist() == list(range(10))
    again = tiny_dit.random_conditions(500, torch.Generator().manual_seed(0))["class_labels"]
    assert torch.equal(labels, again)


def test_the_unconditional_half_has_the_label_after_the_last(tiny_dit: DiffusionTransformer) -> None:
    given = {"class_labels": torch.tensor([3, 9], dtype=torch.int32)}
    doubled = tiny_dit.with_unconditional(given)["class_labels"]
    assert doubled.tolist() == [3, 9, 10, 10]
    assert doubled.dtype == torch.int32


def test_a_missing_condition_is_not_made_up(tiny_dit: DiffusionTransformer) -> None:
    with pytest.raises(KeyError, match="class_labels"):
        tiny_dit.with_unconditional({})


@pytest.mark.parametrize(
    ("latent_shape", "pixels"),
    [((1, 8, 8), True), ((3, 8, 8), True), ((4, 8, 8), False), ((3, 5, 8, 8), False), ((3, 64), False)],
)
def test_pictures_have_one_or_three_channels_a_height_and_a_width(
    tiny_dit: DiffusionTransformer, latent_shape: tuple[int, ...], pixels: bool
) -> None:
    assert dataclasses.replace(tiny_dit.geometry, latent_shape=latent_shape).pixels is pixels
