"""PixArt's prompt: its mask, its length, and options that do not fit."""

from pathlib import Path

import pytest
import torch
import zoo

from tc_deploy.errors import ModelError
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model


def test_masked_prompt_tokens_play_no_part() -> None:
    model = zoo.model("pixart")
    inputs = zoo.inputs_of(model, batch=2, seed=1)
    inputs["encoder_attention_mask"] = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]]).repeat(2, 1)
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][:, 2:] = 7.0
    assert torch.equal(model.forward(inputs), model.forward(other))
    other["encoder_hidden_states"][:, :1] = 7.0
    assert not torch.equal(model.forward(inputs), model.forward(other))


@pytest.mark.parametrize(("changes", "tokens"), [({}, 120), ({"use_additional_conditions": False}, 300)])
def test_the_prompt_s_default_length_is_alpha_s_or_sigma_s(
    tmp_path: Path, changes: dict[str, bool], tokens: int
) -> None:
    geometry = load_model(zoo.save("pixart", tmp_path / "model", **changes)).geometry
    assert geometry.text_tokens == tokens
    shapes = {condition.name: condition.shape for condition in geometry.conditions}
    assert shapes == {"encoder_hidden_states": (tokens, 24), "encoder_attention_mask": (tokens,)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ModelOptions(latent_size=(8, 9)), "multiples of 2x2"),
        (ModelOptions(latent_size=(8,)), "expected 2 axes"),
        (ModelOptions(latent_size=(2, 8, 8)), "expected 2 axes"),
        (ModelOptions(latent_size=(0, 8)), "multiples of 2x2"),
        (ModelOptions(text_tokens=0), "at least 1, found 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: ModelOptions, reason: str) -> None:
    folder = zoo.save("pixart", tmp_path / "model")
    with pytest.raises(ModelError, match=reason) as raised:
        load_model(folder, options)
    assert str(raised.value).startswith(str(folder))


def test_options_are_recorded_and_read_back() -> None:
    record = zoo.model("pixart").record()
    assert ModelOptions.of(record) == ModelOptions(latent_size=(8, 12), text_tokens=5)
    assert (record.tokens, record.width) == (24, 64)
