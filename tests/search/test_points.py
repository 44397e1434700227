"""What a point's pictures are asked for by."""

import dataclasses

import pytest

from tc_deploy.errors import ModelError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import Condition
from tc_deploy.search.points import classes_of


def test_a_model_that_is_not_asked_by_class_is_refused_by_name(tiny_dit: DiffusionTransformer) -> None:
    assert classes_of(tiny_dit) == 10
    text = Condition(name="encoder_hidden_states", dtype="float32", shape=(7, 16), classes=None)
    geometry = dataclasses.replace(tiny_dit.geometry, conditions=(text,))
    with pytest.raises(ModelError, match="conditioned on encoder_hidden_states; use tc-deploy calibrate"):
        classes_of(dataclasses.replace(tiny_dit, geometry=geometry))
